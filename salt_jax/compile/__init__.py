"""Whole programs through the compilers of TPU and GPU, with the device or without: does it compile,
does it fit.
"""
