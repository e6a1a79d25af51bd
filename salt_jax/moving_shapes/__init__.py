"""The small world: its clips, their captions, the exact denoiser, and how samples of it are
scored.
"""
