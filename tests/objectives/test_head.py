"""A Head proves itself: it gives the model's own logits, or the model is refused."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests import families
from tests.families import text_sizes
from vlm_taid.errors import InputError
from vlm_taid.objectives import Head, redirected
from vlm_taid.pretrained import ModelOptions, load_model


def made(config_class, model_class, **more):
    torch.manual_seed(0)
    sizes = text_sizes(100) | {"head_dim": 8} | more
    model = model_class(config_class(**sizes)).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)  # zeros as it is made
    return model


CASES = {
    "plain": (Qwen2Config, Qwen2ForCausalLM, {}, {}),
    "tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}, {}),
    "soft cap": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 5.0}, {"softcap": 5.0}),
    "soft cap of Gemma 3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"final_logit_softcapping": 20.0, "query_pre_attn_scalar": 8},
        {"softcap": 20.0},
    ),
    "bias": (PhiConfig, PhiForCausalLM, {"pad_token_id": 0}, {"softcap": None, "scale": 1.0}),
    "divided": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}, {"scale": 0.125}),
    "multiplied": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.0625}, {"scale": 0.0625}),
}


@pytest.mark.parametrize("case", CASES)
def test_head_is_found_and_exact(case):
    config_class, model_class, options, expected = CASES[case]
    model = made(config_class, model_class, **options)
    head = Head.of(model)
    assert {key: getattr(head, key) for key in expected} == expected
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        own = model(ids).logits[0]
        assert (head(model.base_model(ids).last_hidden_state[0]) - own).abs().max() < 1e-5 * own.abs().max()


def test_padding_may_have_a_bias_of_minus_infinity():
    model = made(PhiConfig, PhiForCausalLM, pad_token_id=0)
    model.lm_head.bias.data[90:] = -torch.inf
    assert Head.of(model).bias is model.lm_head.bias
    model.lm_head.bias.data[3] = torch.nan
    with pytest.raises(InputError, match="differ from the model's own by nan"):
        Head.of(model)


def test_soft_cap_that_the_model_does_not_apply_is_not_taken():
    """A config may carry a soft cap that its class ignores (as Gemma 3's vision-language class does)."""
    model = made(Qwen2Config, Qwen2ForCausalLM, final_logit_softcapping=5.0)
    assert model.config.final_logit_softcapping == 5.0 and Head.of(model).softcap is None


def test_gemma_3_with_a_vision_tower_applies_no_soft_cap():
    """Its config may carry one, which its causal class applies and this one does not."""
    model = load_model(ModelOptions(families.made("gemma3"))).eval()
    model.config.get_text_config().final_logit_softcapping = 5.0
    assert Head.of(model).softcap is None


@pytest.mark.parametrize("applied", [None, 4.0, 5.1, 6.0, 50.0])
def test_wrong_soft_cap_is_refused(applied):
    """The config says 5, the model applies another, or none together with a scale that is not told."""

    class Wrong(Gemma2ForCausalLM):
        def forward(self, *args, **kwargs):
            self.config.final_logit_softcapping = applied
            try:
                output = super().forward(*args, **kwargs)
            finally:
                self.config.final_logit_softcapping = 5.0
            if applied is None:
                output.logits = output.logits * 0.9
            return output

    model = made(Gemma2Config, Wrong, final_logit_softcapping=5.0)
    with pytest.raises(InputError, match="none of those known"):
        Head.of(model)


def test_head_of_an_unknown_form_is_refused():
    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.square()
            return output

    from transformers import LlamaConfig

    with pytest.raises(InputError, match="none of those known"):
        Head.of(Odd(LlamaConfig(**text_sizes(100))))


def test_proof_leaves_the_model_as_it_was():
    model = made(Qwen2Config, Qwen2ForCausalLM).train()
    model.base_model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    Head.of(model)
    assert [module.training for module in model.modules()] == modes and not model.base_model._forward_hooks


def test_redirection_restores_the_forward():
    layer = torch.nn.Linear(2, 2)
    called = []
    layer.register_forward_hook(lambda *_: called.append(True))
    assert redirected(layer, layer, lambda x: x + 1, torch.zeros(1)).item() == 1.0
    assert called and "forward" not in layer.__dict__
    with pytest.raises(ZeroDivisionError):
        redirected(layer, layer, lambda: 1 / 0)
    assert "forward" not in layer.__dict__
