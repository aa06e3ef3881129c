"""The doorbell: what SGLang is sent. Sessions themselves are tested through their server, in test_sglang_push.py."""

from __future__ import annotations

import base64
import pickle
import pickletools

import torch

from fake_sglang import read_bell
from miles_spec.rollout.sglang_session import bell

CONTENT = {"address": ["127.0.0.1", 1], "token": "é" * 64, "session": 3, "role": "draft"}


def test_a_bell_is_one_tensor_of_bytes_on_the_cpu() -> None:
    ((name, tensor),) = pickle.loads(base64.b64decode(bell(CONTENT)))
    assert name == "miles_spec" and tensor.dtype == torch.uint8 and tensor.device.type == "cpu"
    assert read_bell(bell(CONTENT)) == CONTENT


def test_a_bell_names_nothing_but_a_byte_tensor() -> None:
    """SGLang's unpickler allows a list of names, and no handle to shared or GPU memory may be among them."""
    strings = [arg for op, arg, _ in pickletools.genops(base64.b64decode(bell(CONTENT))) if isinstance(arg, str)]
    assert strings == ["miles_spec", "torch", "ByteTensor"]
