import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForImageClassification

from benchmarks.peers.efficientnet_lite import EfficientNetLiteHeadConfig, EfficientNetLiteWithHead

from ...test_modeling_efficientnet_lite import TINY
from ...tolerance import assert_close_outputs


def test_a_peer_s_checkpoint_loads_again(tmp_path):
    torch.manual_seed(0)
    model = EfficientNetLiteWithHead(EfficientNetLiteHeadConfig(**TINY, num_labels=3, head="linear")).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert type(again) is type(model)
    assert_close_outputs(again(pixels).logits, model(pixels).logits)


def test_an_unknown_head_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="head must be one of"):
        EfficientNetLiteHeadConfig(head="none")
