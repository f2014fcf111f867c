"""Attention in Gluon for NVIDIA Hopper (sm_90): TMA, wgmma, warp specialization."""
