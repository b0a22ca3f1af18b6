"""VLoRA in transformers' own tests (common/tests/transformers_suite): collected by test_transformers.py's long tests.

Every test of the suite that is not run has its name and the reason here; they are of the architecture.
"""

import copy
import unittest
from unittest import mock

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_processing_common import ProcessorTesterMixin
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers import initialization as init

from papers.vlora import VLoRAConfig, VLoRAForConditionalGeneration, VLoRAProcessor
from papers.vlora.generator import PerceptualWeightsGenerator
from papers.vlora.processing import IMAGE, TEMPLATES

# Tests that give marks without an image, or an image without the ids that say where it stands. Both are errors here, so
# theirs are rows of text.
TEXT_ALONE = ("eager_matches_sdpa_inference", "test_inputs_embeds")
MARK = 5  # of the vocabulary, but none of the ids 0 to 4 that the suite's own rows hold


class Tester:
    def __init__(self, parent):
        self.parent, self.is_training = parent, True
        self.batch_size, self.seq_length = 3, 8
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 99, 32, 2, 4

    def get_config(self):
        text = LlamaConfig(
            vocab_size=self.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8,
        )
        return VLoRAConfig(
            text_config=text, vision_config=vision, num_features=4, visual_width=16, image_token_id=MARK, width=16,
            heads=4, blocks=1, rank=3, alpha=6, every=1,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(min=MARK + 1)
        ids[:, 3] = MARK  # not first, where padding would leave its dead slot nothing to see
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if any(name in self.parent._testMethodName for name in TEXT_ALONE):
            inputs["input_ids"] = ids.masked_fill(ids == MARK, MARK + 1)
        else:
            inputs["pixel_values"] = torch.randn(self.batch_size, 3, 16, 16)
        return self.get_config(), inputs


def _with_an_effect(generator):
    """B starts at zero, and then no test would see an image."""
    _reset(generator)
    for letter in generator.types:
        init.normal_(getattr(generator, f"B_{letter}"), std=0.2)


_reset = PerceptualWeightsGenerator.reset_parameters


class VLoRAModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (VLoRAForConditionalGeneration,)
    all_generative_model_classes = (VLoRAForConditionalGeneration,)
    _is_composite = True

    def setUp(self):
        self.enterContext(mock.patch.object(PerceptualWeightsGenerator, "reset_parameters", _with_an_effect))
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(self, config_class=VLoRAConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs)
        if return_labels:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == MARK, -100)
        return inputs

    @unittest.skip("counts calls of the first checkpointed layer, which is the frozen tower's and is not computed anew")
    def test_training_gradient_checkpointing(self):
        pass

    @unittest.skip("as test_training_gradient_checkpointing")
    def test_training_gradient_checkpointing_use_reentrant_false(self):
        pass

    @unittest.skip("refused with a reason: reentrant checkpointing would lose the gradient of the visual weights")
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        pass

    @unittest.skip("an image becomes weights: a forward pass returns no outputs of a vision tower beside the text's")
    def test_multimodal_outputs_are_returned(self):
        pass

    @unittest.skip("neither of its parts is the model without a head; a prefix would have names of weights guessed")
    def test_model_base_model_prefix(self):
        pass

    @unittest.skip("wants config.vocab_size, which a config of configs has not")
    def test_training_overfit(self):
        pass


def _bytes() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, which loses nothing of a text."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class VLoRAProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VLoRAProcessor

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})

    @classmethod
    def _setup_tokenizer(cls):
        return _bytes()

    @classmethod
    def _setup_test_attributes(cls, processor):
        cls.image_token = IMAGE

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": TEMPLATES["vicuna_v1"], "pad_to_square": False}  # as the image processor alone
