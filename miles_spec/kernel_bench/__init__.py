"""`miles-spec bench kernels`: what our kernels cost beside public ones and beside the least that the same work costs.

Invariant: the command alone imports this package, which may import every kernel.
"""
