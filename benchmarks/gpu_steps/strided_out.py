"""Does `aten::cudnn_convolution.out` write into a channel slice of a channels-last workspace, or into a copy of it?"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsr.bench.cases.gpu_steps import common

result, _ = common.arguments()
for name in ("bfloat16", "float16", "float32"):
    dtype = getattr(torch, name)
    workspace = torch.full((4, 192, 48, 48), torch.nan, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = torch.randn(4, 64, 48, 48, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    workspace[:, :64] = x
    weight = (torch.randn(32, 64, 3, 3, device="cuda") / 24).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x, weight, padding=1)
    found = {}
    for source, tensor in (("dense input", x), ("input slice", workspace[:, :64])):
        out = workspace[:, 64:96]
        out.fill_(torch.nan)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            options = ([1, 1], [1, 1], [1, 1], 1, False, False, True)
            returned = torch.ops.aten.cudnn_convolution.out(tensor, weight, *options, out=out)
            torch.cuda.synchronize()
        except Exception as error:  # a refusal is an answer
            found[source] = {"error": common.short(error)}
            continue
        found[source] = {
            "same_storage": returned.data_ptr() == out.data_ptr(),
            "strides_kept": returned.stride() == out.stride(),
            "written_in_workspace": bool(torch.isfinite(workspace[:, 64:96]).all()),
            "neighbours_untouched": bool(torch.isnan(workspace[:, 96:]).all()) and torch.equal(workspace[:, :64], x),
            "largest_difference": (returned.float() - expected.float()).abs().max().item(),
            "extra_bytes": torch.cuda.max_memory_allocated() - before,
        }
    result.save(**{name: found})
    print(name, found, flush=True)
