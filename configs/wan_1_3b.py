"""Wan2.1 1.3B, bidirectional: one chunk of all 21 latent frames, 50 steps of UniPC with guidance, 480x832.

Shift and guidance are what the model's README advises at this size; the negative prompt is the one it was tuned with.
"""

from lf_jax.config import Config, Rollout, Video

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

CONFIG = Config(
    rollout=Rollout(chunk_frames=21, sampler="unipc", num_inference_steps=50, guidance_scale=6.0, shift=8.0),
    video=Video(negative_prompt=NEGATIVE_PROMPT),
)
