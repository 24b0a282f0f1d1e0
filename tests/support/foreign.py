# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for models whose code is not in transformers: our own code with the same seams.

`llava`: get_model, get_vision_tower, encode_images, prepare_inputs_labels_for_multimodal, generate(inputs, images).
`internvl_chat`: vision_model, extract_feature, pixel_shuffle, img_context_token_id, language_model, generate.
`minicpm_v`: llm, vpm, resampler, get_vllm_embedding. `kimi_vl`: vision_tower, multi_modal_projector, language_model,
_extract_image_features, _merge_with_image_features. `molmo`: model.vision_backbone, model.transformer, image_input_idx.
"""

from __future__ import annotations

import tiny
import torch
import transformers as tf
from torch import nn
from torch.nn.utils.rnn import pad_sequence

IGNORE, IMAGE = -100, -200


class ClipTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower = tf.CLIPVisionModel(tf.CLIPVisionConfig(**tiny.vision_config()))
        self.num_patches = 16

    def forward(self, images):
        return self.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]


class LlavaBase(tf.LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.tower, self.mm_projector = ClipTower(), nn.Linear(32, config.hidden_size)
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size))


class LlavaStandIn(tf.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlavaBase(config)

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.model.tower

    def encode_images(self, images):
        return self.model.mm_projector(self.get_vision_tower()(images))

    def _features(self, images):
        """One entry per image: a newline after each of the four rows; a list holds pictures of several views."""
        if isinstance(images, list):
            views = self.encode_images(torch.cat(images)).split([len(image) for image in images])
        else:
            views = self.encode_images(images)[:, None]
        newline = self.model.image_newline
        rows = [image.unflatten(1, (4, 4)).flatten(0, 1) for image in views]
        return [torch.cat([r, newline.expand(len(r), 1, -1).to(r)], 1).flatten(0, 1) for r in rows]

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        features, rows, marks = iter(self._features(images)), [], []
        for row, ids in enumerate(input_ids):
            parts, origin = [], []
            for place, token in enumerate(ids):
                if attention_mask is not None and not attention_mask[row, place]:
                    continue
                if token == IMAGE:
                    parts.append(next(features))
                    origin.append(torch.full((len(parts[-1]),), IGNORE))
                else:
                    parts.append(self.model.embed_tokens(token[None]))
                    origin.append(torch.tensor([IGNORE]) if labels is None else labels[row, place : place + 1])
            rows.append(torch.cat(parts))
            marks.append(torch.cat(origin))
        embeds = pad_sequence(rows, True, padding_side="left")
        mask = pad_sequence([torch.ones(len(x)) for x in rows], True, padding_side="left").long()
        new = None if labels is None else pad_sequence(marks, True, IGNORE, padding_side="left")
        return None, None, None if attention_mask is None else mask, past_key_values, embeds, new

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        images, sizes = kwargs.pop("images", None), kwargs.pop("image_sizes", None)
        embeds, labels = kwargs.pop("inputs_embeds", None), kwargs.pop("labels", None)
        if embeds is None:
            given = (input_ids, position_ids, attention_mask, past_key_values, labels, images, sizes)
            prepared = self.prepare_inputs_labels_for_multimodal(*given)
            input_ids, position_ids, attention_mask, past_key_values, embeds, labels = prepared
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, **kwargs):
        mask = kwargs.pop("attention_mask", None)
        given = (inputs, None, mask, None, None, images)
        _, _, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(*given, image_sizes=image_sizes)
        return super().generate(attention_mask=mask, inputs_embeds=embeds, **kwargs)


def llava(views=None):
    """A batch of two rows with one and two images; ``views`` gives the images that many views each."""
    torch.manual_seed(0)
    model = LlavaStandIn(tf.LlamaConfig(**tiny.text_config())).eval()
    model.generation_config.pad_token_id = 0
    generator = torch.Generator().manual_seed(1)
    image = torch.tensor([IMAGE])
    inputs = tiny.assemble([[3, image, 5], [4, image, 2, image, 5]], generator)
    if views is None:
        images = torch.randn(3, 3, tiny.SIDE, tiny.SIDE, generator=generator)
    else:
        images = [torch.randn(count, 3, tiny.SIDE, tiny.SIDE, generator=generator) for count in views]
    inputs = {"inputs": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "images": images}
    return model, inputs


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = 4, 8**-0.5
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        self.last = (q @ k.mT * self.scale).softmax(-1)
        return self.proj((self.last @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = FusedAttention()

    def forward(self, x):
        return x + self.attn(x)


class InternVLChatStandIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.layers = nn.ModuleList([Block(), Block()])
        self.embed = nn.Linear(108, 32)
        self.language_model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**tiny.text_config()))
        self.mlp1 = nn.Linear(128, tiny.WIDTH)
        self.img_context_token_id, self.downsample_ratio = tiny.IMAGE_ID, 0.5
        self.config = self.language_model.config

    def pixel_shuffle(self, x, scale_factor=0.5):
        n, w, h, c = x.shape
        return x.view(n, w // 2, 2, h // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, w // 2, h // 2, 4 * c)

    def extract_feature(self, pixel_values):
        x = pixel_values.unfold(2, 6, 6).unfold(3, 6, 6).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = self.embed(torch.cat([x[:, :1], x], 1))
        for block in self.vision_model.layers:
            x = block(x)
        return self.mlp1(self.pixel_shuffle(x[:, 1:].unflatten(1, (4, 4))).flatten(1, 2))

    @torch.no_grad()
    def generate(self, pixel_values=None, input_ids=None, attention_mask=None, **kwargs):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        embeds[input_ids == self.img_context_token_id] = self.extract_feature(pixel_values).flatten(0, 1)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def internvl_chat():
    """A batch of two rows: a picture of one tile, and one of two tiles."""
    torch.manual_seed(0)
    model = InternVLChatStandIn().eval()
    model.language_model.generation_config.pad_token_id = 0
    generator = torch.Generator().manual_seed(1)
    rows = [[3, torch.full((4,), tiny.IMAGE_ID), 5], [4, torch.full((8,), tiny.IMAGE_ID), 6]]
    pixels = torch.randn(3, 3, tiny.SIDE, tiny.SIDE, generator=generator)
    return model, {**tiny.assemble(rows, generator), "pixel_values": pixels}


def _language_model():
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**tiny.text_config()))


class MiniCPMVStandIn(nn.Module):
    """``generate`` puts pictures at the bounds that its processor names, and calls the language model itself."""

    def __init__(self):
        super().__init__()
        self.llm, self.vpm, self.resampler = _language_model(), ClipTower(), nn.Linear(32, tiny.WIDTH)
        self.config = self.llm.config

    def get_vllm_embedding(self, data):
        embeds = self.llm.get_input_embeddings()(data["input_ids"])
        features = self.resampler(self.vpm(data["pixel_values"]))
        for row, bounds in enumerate(data["image_bound"]):
            embeds[row, bounds[0] : bounds[1]] = features[row]
        return embeds

    def generate(self, data, **kwargs):
        return self.llm.generate(inputs_embeds=self.get_vllm_embedding(data), **kwargs)


class KimiVLStandIn(nn.Module):
    """``forward`` merges pictures and calls its language model, a model with a head of its own."""

    def __init__(self):
        super().__init__()
        self.vision_tower, self.multi_modal_projector = ClipTower(), nn.Linear(32, tiny.WIDTH)
        self.language_model = _language_model()
        self.config = self.language_model.config

    def get_decoder(self):
        return self.language_model.get_decoder()

    def _extract_image_features(self, pixel_values, image_grid_hws):
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def _merge_with_image_features(self, inputs_embeds, input_ids, image_features):
        inputs_embeds[input_ids == tiny.IMAGE_ID] = image_features.flatten(0, 1)
        return inputs_embeds

    def forward(self, input_ids, pixel_values=None, image_grid_hws=None, **kwargs):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self._extract_image_features(pixel_values, image_grid_hws)
            embeds = self._merge_with_image_features(embeds, input_ids, features)
        return self.language_model(inputs_embeds=embeds, **kwargs)


class MolmoStandIn(nn.Module):
    """The decoder itself adds pictures to its embeddings, at indices that its processor names."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_backbone, self.model.projector = ClipTower(), nn.Linear(32, tiny.WIDTH)
        self.model.transformer = _language_model()
        self.config = self.model.transformer.config

    def forward(self, input_ids, images=None, image_input_idx=None, **kwargs):
        embeds = self.model.transformer.get_input_embeddings()(input_ids)
        if images is not None:
            rows = torch.arange(len(embeds))[:, None].expand_as(image_input_idx)
            embeds[rows, image_input_idx] += self.model.projector(self.model.vision_backbone(images))
        return self.model.transformer(inputs_embeds=embeds, **kwargs)
