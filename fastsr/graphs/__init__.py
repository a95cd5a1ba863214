"""CUDA graphs of models and of whole training steps: one launch from Python in place of thousands."""

from fastsr.graphs.module import GraphedModule
from fastsr.graphs.step import GraphedStep
from fastsr.graphs.wrapping import cuda_graph

__all__ = ["GraphedModule", "GraphedStep", "cuda_graph"]
