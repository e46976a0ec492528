"""L2BN at batch norm's cost: formulas, their autograd functions, and their compilation. Nothing here is a layer."""
