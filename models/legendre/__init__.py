"""Legendre memories: the LMU, the LMUFormer and its spiking form."""
