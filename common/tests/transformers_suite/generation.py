"""In place of transformers' GenerationTesterMixin, which its source distribution lacks; see this folder's __init__.py.

Whatever way `generate` takes to an answer, it must be the one that the forward pass gives. A host class has
`model_tester` and `all_generative_model_classes`, as ModelTesterMixin wants them.
"""

import copy
import inspect
import tempfile

import torch
from transformers import GenerationConfig, StaticCache, set_seed
from transformers.generation.streamers import BaseStreamer

LENGTH = 4  # of answers


class _Heard(BaseStreamer):
    def __init__(self):
        self.said = []

    def put(self, value):
        self.said.extend(value.flatten().tolist())

    def end(self):
        self.said.append(None)


class GenerationTesterMixin:
    input_name = "input_ids"  # a model without a text prompt names another

    # For a host class to replace ----------------------------------------------------------------------------

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        rows = {
            key: value[:batch_size] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
            if value is not None and key != "labels"
        }
        if "attention_mask" in rows:
            rows["attention_mask"] = torch.ones_like(rows["attention_mask"])
        config.get_text_config(decoder=True).eos_token_id = None
        return config, rows

    def one_row(self, inputs, i):
        """A row of a batch whose tensors all have an entry for each row."""
        return {key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}

    # Shared -------------------------------------------------------------------------------------------------

    def cases(self, ids=False):
        """(model with weights large enough for all of them to matter, inputs); `ids`: of those with a text prompt."""
        if ids and self.input_name != "input_ids":
            self.skipTest("the prompt is not token ids")
        for kind in self.all_generative_model_classes:
            config, inputs = self.prepare_config_and_inputs_for_generate()
            set_seed(0)
            model = kind(copy.deepcopy(config)).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
            yield model, inputs

    def reply(self, model, inputs, **options):
        options = {"do_sample": False, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH} | options
        return model.generate(**copy.deepcopy(inputs) | options)

    def prompt(self, inputs):
        return inputs["input_ids"].shape[1] if self.input_name == "input_ids" else 0

    def assertSame(self, first, second):
        self.assertEqual(first.tolist(), second.tolist())

    # What is asked ------------------------------------------------------------------------------------------

    def test_it_generates(self):
        self.assertTrue(self.all_generative_model_classes)
        self.assertTrue(all(kind.can_generate() for kind in self.all_generative_model_classes))

    def test_prompt_stays_and_length_is_as_asked(self):
        for model, inputs in self.cases():
            answer, start = self.reply(model, inputs), self.prompt(inputs)
            self.assertEqual(answer.shape[1], start + LENGTH)
            if start:
                self.assertSame(answer[:, :start], inputs["input_ids"])

    def test_scores_logits_states_and_attentions_are_handed_out(self):
        for model, inputs in self.cases():
            model.set_attn_implementation("eager")
            whole = self.reply(
                model, inputs, return_dict_in_generate=True, output_scores=True, output_logits=True,
                output_hidden_states=True, output_attentions=True,
            )
            text = model.config.get_text_config(decoder=True)
            for kind in (whole.scores, whole.logits):
                self.assertEqual([step.shape[-1] for step in kind], [text.vocab_size] * LENGTH)
            self.assertEqual(len(whole.hidden_states), LENGTH)
            self.assertEqual([len(step) for step in whole.attentions], [text.num_hidden_layers] * LENGTH)
            self.assertSame(whole.sequences, self.reply(model, inputs))

    def test_end_token_ends(self):
        for model, inputs in self.cases():
            inputs, start = self.one_row(inputs, 0), self.prompt(inputs)
            first = self.reply(model, inputs)[0, start].item()
            ended = self.reply(model, inputs, eos_token_id=first, min_new_tokens=0)
            self.assertEqual(ended[0, start:].tolist(), [first])

    def test_streamer_hears_the_answer(self):
        for model, inputs in self.cases():
            inputs, ear = self.one_row(inputs, 0), _Heard()
            answer = self.reply(model, inputs, streamer=ear)
            self.assertEqual(ear.said[-LENGTH - 1 :], [*answer[0, -LENGTH:].tolist(), None])

    def test_generation_defaults_are_saved(self):
        for model, inputs in self.cases():
            model.generation_config = GenerationConfig(max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                again = type(model).from_pretrained(folder).eval()
            self.assertEqual(again.generation_config.max_new_tokens, LENGTH)
            self.assertSame(again.generate(**inputs)[:, -LENGTH:], self.reply(model, inputs)[:, -LENGTH:])

    def test_greedy_equals_forward_passes(self):
        for model, inputs in self.cases(ids=True):
            longer = dict(inputs)
            for _ in range(LENGTH):
                with torch.no_grad():
                    best = model(**longer, use_cache=False).logits[:, -1:].argmax(-1)
                longer["input_ids"] = torch.cat([longer["input_ids"], best], 1)
                if "attention_mask" in longer:
                    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
            self.assertSame(self.reply(model, inputs), longer["input_ids"])

    def test_greedy_needs_no_cache(self):
        for model, inputs in self.cases():
            self.assertSame(self.reply(model, inputs, use_cache=False), self.reply(model, inputs))

    def test_greedy_with_a_static_cache(self):
        for model, inputs in self.cases():
            expected = self.reply(model, inputs)
            self.assertSame(self.reply(model, inputs, cache_implementation="static"), expected)
            name = "cache" if "cache" in inspect.signature(model.prepare_inputs_for_generation).parameters else None
            cache = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=expected.shape[1] + 1)
            if self.prompt(inputs):
                self.assertSame(self.reply(model, inputs, **{name or "past_key_values": cache}), expected)

    def test_greedy_row_by_row(self):
        for model, inputs in self.cases():
            for i, expected in enumerate(self.reply(model, inputs)):
                self.assertSame(self.reply(model, self.one_row(inputs, i))[0], expected)

    def test_greedy_with_padding_on_the_left(self):
        for model, inputs in self.cases(ids=True):
            ids = inputs["input_ids"]
            pad, mask = torch.zeros_like(ids[:, :2]), inputs.get("attention_mask", torch.ones_like(ids))
            padded = inputs | {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([pad, mask], 1)}
            self.assertSame(self.reply(model, padded)[:, 2:], self.reply(model, inputs))

    def test_greedy_from_embeddings(self):
        for model, inputs in self.cases(ids=True):
            if "inputs_embeds" not in inspect.signature(model.forward).parameters:
                self.skipTest("forward takes no inputs_embeds")
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            self.assertSame(self.reply(model, inputs, inputs_embeds=embeds), self.reply(model, inputs))

    def test_greedy_goes_on_from_its_cache(self):
        for model, inputs in self.cases(ids=True):
            twice = self.reply(model, inputs, max_new_tokens=2 * LENGTH, min_new_tokens=2 * LENGTH)
            first = self.reply(model, inputs, return_dict_in_generate=True)
            more = inputs | {"input_ids": first.sequences, "past_key_values": first.past_key_values}
            if "attention_mask" in more:
                more["attention_mask"] = torch.ones_like(first.sequences)
            second = model.generate(**more, do_sample=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
            self.assertSame(second, twice)

    def test_greedy_with_guesses(self):
        """Of prompt lookup, and of a copy of the model."""
        for model, inputs in self.cases(ids=True):
            inputs = self.one_row(inputs, 0)
            expected = self.reply(model, inputs)
            self.assertSame(self.reply(model, inputs, prompt_lookup_num_tokens=2), expected)
            self.assertSame(self.reply(model, inputs, assistant_model=copy.deepcopy(model)), expected)

    def test_beams(self):
        for model, inputs in self.cases():
            rows = len(self.reply(model, inputs))
            found = self.reply(
                model, inputs, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
            )
            best, second = found.sequences_scores.view(rows, 2).T
            self.assertTrue((best >= second).all())
            beams = [self.reply(model, inputs, num_beams=3, use_cache=cache) for cache in (True, False)]
            self.assertSame(*beams)

    def test_sampling_follows_its_seed(self):
        for model, inputs in self.cases():
            drawn = []
            for _ in range(2):
                set_seed(5)
                drawn.append(self.reply(model, inputs, do_sample=True, num_return_sequences=2))
            self.assertSame(*drawn)

    def test_logits_to_keep(self):
        for model, inputs in self.cases(ids=True):
            with torch.no_grad():
                whole, last = model(**inputs).logits, model(**inputs, logits_to_keep=1).logits
            torch.testing.assert_close(last, whole[:, -1:], rtol=1e-4, atol=1e-4)
