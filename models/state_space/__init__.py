"""Selective state spaces: Mamba, Mamba-2, MambaMixer and TSM2."""
