"""The negative prompts of Wan 2.1: what guidance steers away from where a user says nothing
else.
"""

NEGATIVE_TEXT_TO_VIDEO = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
    "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Garish, overexposed, static, subtitles, greyish, poor quality, JPEG artefacts, ill-drawn hands,
walking backwards.
"""

NEGATIVE_IMAGE_TO_VIDEO = "镜头晃动，" + NEGATIVE_TEXT_TO_VIDEO
"""Those, and a shaking camera."""


def negative_prompt(given: str | None, image_to_video: bool) -> str:
    """The user's prompt, even an empty one, or else Wan's own for the kind of model."""
    usual = NEGATIVE_IMAGE_TO_VIDEO if image_to_video else NEGATIVE_TEXT_TO_VIDEO
    return usual if given is None else given
