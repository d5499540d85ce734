"""Networks: the decoder, its Continuum Memory System, and their FLOPs."""
