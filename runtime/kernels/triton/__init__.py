"""Triton kernels that read packed weights, and the layout they read.

``fragment_layout`` needs torch alone; everything else here needs Triton (the extra ``triton``).
"""
