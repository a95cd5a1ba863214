"""Other people's networks for `fuse_`, small for the tests and in their published sizes for the table in docs/fuse.md."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Network:
    """`make(size)` builds it, with size "small" or "full"; `kinds` are the kinds of blocks that must be fused, `shape` is its input, and
    `left` what the reasons must say of others that were not."""

    make: Callable[[str], nn.Module]
    kinds: frozenset[str]
    shape: tuple[int, ...] = (1, 3, 32, 32)
    left: str = ""

    def built(self, size: str = "small") -> nn.Module:
        """With random weights that are the same each time."""
        torch.manual_seed(0)
        return self.make(size)


def spandrel(path: str, small: dict[str, Any], full: dict[str, Any] | None = None) -> Callable[[str], nn.Module]:
    """A class of spandrel or spandrel_extra_arches: "package: Architecture/file: Class"."""
    package, module, name = path.split(":")

    def make(size: str) -> nn.Module:
        found = importlib.import_module(f"{package}.architectures.{module}")
        return getattr(found, name)(**(small if size == "small" or full is None else full))

    return make


def basicsr(file: str, name: str, small: dict[str, Any], full: dict[str, Any]) -> Callable[[str], nn.Module]:
    """A class of BasicSR's own architecture files. The package itself no longer imports (its data part wants an older torchvision), so the
    packages around the file are empty ones with the same paths."""

    def make(size: str) -> nn.Module:
        known = sys.modules.get("basicsr")
        root = Path(known.__path__[0]) if known else Path(importlib.util.find_spec("basicsr").origin).parent
        for package in ("basicsr", "basicsr.archs", "basicsr.utils", "basicsr.ops", "basicsr.ops.dcn"):
            module = sys.modules.setdefault(package, ModuleType(package))
            module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        for package, names in (("utils", ["get_root_logger"]), ("ops.dcn", ["ModulatedDeformConvPack", "modulated_deform_conv"])):
            for missing in names:
                setattr(sys.modules[f"basicsr.{package}"], missing, type(missing, (nn.Module,), {}))
        return getattr(importlib.import_module(f"basicsr.archs.{file}"), name)(3, 3, **(small if size == "small" else full))

    return make


def timm(name: str) -> Callable[[str], nn.Module]:
    return lambda size: importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10)


def timm_attention(size: str) -> nn.Module:
    """timm's squeeze-and-excitation by itself."""
    return importlib.import_module("timm.layers").SEModule(64)


def vq_model(size: str) -> nn.Module:
    channels = (16, 32) if size == "small" else (128, 256)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    codes = {"num_vq_embeddings": 64, "norm_num_groups": 8} if size == "small" else {"num_vq_embeddings": 8192}
    model = importlib.import_module("diffusers").VQModel(block_out_channels=channels, **kinds, **codes)
    nn.init.normal_(model.quantize.embedding.weight)  # its own are so close to each other that any rounding changes the index
    return model


def lucidrains(**options: Any) -> Callable[[str], nn.Module]:
    def make(size: str) -> nn.Module:
        package = importlib.import_module("vector_quantize_pytorch")
        dim, codes = (16, 64) if size == "small" else (256, 1024)
        return package.VectorQuantize(dim=dim, codebook_size=codes, **options)

    return make


RDB, ATTENTION, CONVOLUTIONS, QUANTIZER = "residual dense block", "channel attention", "convolutions", "vector quantiser"
PLUS = "residual dense block of ESRGAN+"
ESRGAN = "spandrel:ESRGAN.__arch.RRDB:RRDBNet"
WINDOWS = {"img_size": 16, "embed_dim": 24, "depths": (2,), "num_heads": (2,), "window_size": 8, "upscale": 2, "upsampler": "pixelshuffle"}
WIDE = {
    **{"img_size": 64, "embed_dim": 180, "depths": (6,) * 6, "num_heads": (6,) * 6, "mlp_ratio": 2},
    **{"upscale": 4, "upsampler": "pixelshuffle"},
}

#: Module of the package that must be there -> name -> network
NETWORKS: dict[str, dict[str, Network]] = {
    "spandrel": {
        "ESRGAN x4": Network(spandrel(ESRGAN, {"num_filters": 8, "num_blocks": 1}, {}), frozenset({"RRDB", RDB, CONVOLUTIONS})),
        "ESRGAN x2, unshuffled": Network(
            spandrel(ESRGAN, {"in_nc": 12, "num_filters": 8, "num_blocks": 1, "shuffle_factor": 2, "scale": 4}), frozenset({"RRDB", RDB})
        ),
        "ESRGAN+": Network(
            spandrel(ESRGAN, {"num_filters": 8, "num_blocks": 1, "plus": True}, {"plus": True}), frozenset({PLUS, CONVOLUTIONS})
        ),
        "RCAN x4": Network(
            spandrel("spandrel:RCAN.__arch.rcan_arch:RCAN", {"n_resgroups": 1, "n_resblocks": 2, "n_feats": 32}, {}),
            frozenset({"RCAB", CONVOLUTIONS}),
        ),
        "HAT": Network(
            spandrel(
                "spandrel:HAT.__arch.HAT:HAT",
                {**WINDOWS, "overlap_ratio": 0.5, "squeeze_factor": 6},
                {**WIDE, "window_size": 16},
            ),
            frozenset({"CAB"}),
            (1, 3, 16, 16),
        ),
        "DRCT": Network(
            spandrel("spandrel:DRCT.__arch.drct_arch:DRCT", {**WINDOWS, "gc": 8}, {**WIDE, "window_size": 16}),
            frozenset({CONVOLUTIONS}),
            (1, 3, 16, 16),
        ),
        "SwinIR, real-world": Network(
            spandrel(
                "spandrel:SwinIR.__arch.SwinIR:SwinIR",
                {**WINDOWS, "upscale": 4, "upsampler": "nearest+conv"},
                {**WIDE, "window_size": 8, "upsampler": "nearest+conv"},
            ),
            frozenset({CONVOLUTIONS}),
            (1, 3, 16, 16),
        ),
        "GRL": Network(
            spandrel(
                "spandrel:GRL.__arch.grl:GRL",
                {
                    **{"img_size": 16, "embed_dim": 24, "depths": [2], "num_heads_window": [2], "num_heads_stripe": [2], "upscale": 2},
                    **{"stripe_size": [8, 8], "local_connection": True, "upsampler": "pixelshuffle", "anchor_window_down_factor": 2},
                },
                {
                    **{"embed_dim": 180, "depths": [4, 4, 8, 8, 8, 4, 4], "num_heads_window": [3] * 7, "num_heads_stripe": [3] * 7},
                    **{"mlp_ratio": 2.0, "upscale": 4, "stripe_size": [16, 16], "anchor_window_down_factor": 2},
                    **{"local_connection": True, "upsampler": "pixelshuffle"},
                },
            ),
            frozenset({"CAB", CONVOLUTIONS}),
            (1, 3, 16, 16),
        ),
        "MM-RealSR": Network(
            spandrel(
                "spandrel:MMRealSR.__arch.mmrealsr_arch:MMRRDBNet_test",
                {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "num_block": 1, "num_grow_ch": 8},
                {"num_in_ch": 3, "num_out_ch": 3},
            ),
            frozenset({"RRDB", RDB, CONVOLUTIONS}),
        ),
        "OmniSR": Network(
            spandrel("spandrel:OmniSR.__arch.OmniSR:OmniSR", {"num_feat": 16}, {"res_num": 5}), frozenset({ATTENTION}), (1, 3, 32, 32)
        ),
        "SAFMN": Network(spandrel("spandrel:SAFMN.__arch.safmn:SAFMN", {"dim": 8, "n_blocks": 2}, {"dim": 36}), frozenset({CONVOLUTIONS})),
        "RealCUGAN x2": Network(spandrel("spandrel:RealCUGAN.__arch.upcunet_v3:UpCunet2x", {}), frozenset({ATTENTION}), (1, 3, 48, 48)),
        "RestoreFormer's quantiser": Network(
            spandrel(
                "spandrel:RestoreFormer.__arch.restoreformer_arch:VectorQuantizer",
                {"n_e": 32, "e_dim": 8, "beta": 0.25},
                {"n_e": 1024, "e_dim": 256, "beta": 0.25},
            ),
            frozenset({QUANTIZER}),
            (2, 8, 9, 9),
        ),
    },
    "spandrel_extra_arches": {
        "CodeFormer's quantiser": Network(
            spandrel(
                "spandrel_extra_arches:CodeFormer.__arch.codeformer:VectorQuantizer",
                {"codebook_size": 32, "emb_dim": 8, "beta": 0.25},
                {"codebook_size": 1024, "emb_dim": 256, "beta": 0.25},
            ),
            frozenset({QUANTIZER}),
            (2, 8, 9, 9),
        ),
        "FeMaSR's quantiser": Network(
            spandrel("spandrel_extra_arches:FeMaSR.__arch.femasr:VectorQuantizer", {"n_e": 32, "e_dim": 8}, {"n_e": 1024, "e_dim": 512}),
            frozenset({QUANTIZER}),
            (2, 8, 9, 9),
        ),
    },
    "basicsr": {
        "BasicSR's RRDBNet x4": Network(
            basicsr("rrdbnet_arch", "RRDBNet", {"num_feat": 8, "num_block": 1, "num_grow_ch": 4}, {}), frozenset({"RRDB", RDB})
        ),
        "BasicSR's RCAN x4": Network(
            basicsr("rcan_arch", "RCAN", {"num_feat": 32, "num_group": 1, "num_block": 2}, {"num_block": 20}),
            frozenset({"RCAB", CONVOLUTIONS}),
        ),
    },
    "timm": {
        "squeeze-and-excitation alone": Network(timm_attention, frozenset({ATTENTION}), (2, 64, 9, 11)),
        "seresnet18": Network(timm("legacy_seresnet18"), frozenset({ATTENTION}), (2, 3, 64, 64)),
        "mobilenetv3_small_050": Network(timm("mobilenetv3_small_050"), frozenset({ATTENTION}), (2, 3, 64, 64)),
        "regnety_002": Network(timm("regnety_002"), frozenset({ATTENTION}), (2, 3, 64, 64)),
        "efficientnet_b0": Network(timm("efficientnet_b0"), frozenset({ATTENTION}), (2, 3, 64, 64)),
        "eca_resnet33ts": Network(timm("eca_resnet33ts"), frozenset(), (2, 3, 64, 64), "convolution along the channels (ECA)"),
        "ese_vovnet19b_dw": Network(timm("ese_vovnet19b_dw"), frozenset({ATTENTION}), (2, 3, 64, 64)),
    },
    "diffusers": {"VQModel": Network(vq_model, frozenset({QUANTIZER}), (1, 3, 32, 32))},
    "vector_quantize_pytorch": {
        name: Network(lucidrains(**options), frozenset({"vector quantiser (moving average)"}), shape)
        for name, options, shape in (
            ("VectorQuantize", {}, (2, 50, 16)),
            ("VectorQuantize, cosine", {"use_cosine_sim": True}, (2, 50, 16)),
            ("VectorQuantize, heads", {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True}, (2, 50, 16)),
            ("VectorQuantize, images", {"accept_image_fmap": True, "rotation_trick": False}, (2, 16, 5, 7)),
        )
    },
}
