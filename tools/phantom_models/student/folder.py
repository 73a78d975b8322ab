"""The untrained student, built from transformers' own classes: tokenizer, processor, chat template, model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH = 96, 12
TOWER_WIDTH = 128
MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
MAX_TOKENS = 1024

CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}{% generation %}\
{% if message['content'] is string %}{{ ' ' + message['content'] }}\
{% else %}{% for part in message['content'] if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endfor %}{% endif %}\
{{ eos_token }}{% endgeneration %}\
{% elif message['role'] == 'system' %}\
{% if message['content'] is string %}{{ message['content'] + ' ' }}\
{% else %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}\
{% else %}{{ 'USER: ' }}\
{% if message['content'] is string %}{{ message['content'] + ' ' }}\
{% else %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# Text that the tokenizer learns to encode in few tokens, in addition to the phantoms' own language.
GENERAL_TEXT = """
The picture shows what was seen on the film and where it lies. Please describe this image and give your answer in a
few words. What is the most likely diagnosis? Which organ is shown? Which organ system is imaged? Is this an axial,
coronal or sagittal plane? What modality was used to take this image: x-ray, plain film, radiograph, CT, MRI,
ultrasound, angiogram, fluoroscopy? Was contrast given, oral, intravenous or both? Is there evidence of disease? Are
the lungs clear? Is the patient rotated? Where is the lesion located? Which lobe is affected? How would you describe
the mass? Chest, thorax, abdomen, pelvis, head, brain, neck, spine, skull, liver, spleen, kidney, kidneys, pancreas,
stomach, bowel, colon, bladder, gallbladder, aorta, artery, vein, vessels, heart, lung, lungs, lobe, trachea,
bronchus, carina, hilum, hila, mediastinum, mediastinal, diaphragm, hemidiaphragm, clavicle, ribs, rib, scapula,
vertebra, vertebrae, ventricle, ventricles, cortex, white matter, gray matter, cerebellum, brainstem, sinus, orbit,
skin, muscle, bone, soft tissue, fat, air, fluid, blood, calcification, fracture, hemorrhage, infarct, infarction,
edema, mass, tumor, cancer, metastasis, abscess, cyst, stone, stones, obstruction, dilation, dilated, enlarged,
enlargement, enhancement, hyperintense, hypointense, hyperdense, hypodense, opacity, opacities, opacification,
infiltrate, infiltrates, atelectasis, emphysema, fibrosis, pneumonia, pneumoperitoneum, pneumothorax, effusion,
effusions, consolidation, cardiomegaly, nodule, nodules, interstitial, alveolar, reticular, ground glass, pulmonary,
pleural, cardiac, cardiovascular, gastrointestinal, respiratory, neurological, cardiopulmonary, silhouette, contour,
border, margin, angle, costophrenic, bilateral, unilateral, left, right, upper, lower, middle, anterior, posterior,
medial, lateral, central, peripheral, diffuse, focal, small, large, mild, moderate, severe, acute, chronic, normal,
abnormal, abnormality, abnormalities, present, absent, seen, noted, visible, unchanged, increased, decreased,
multiple, single, several, possible, likely, yes, no, none, not, and, or, the, a, an, of, to, in, on, at, by, for,
from, with, without, within, near, above, below, between, behind, before, after, during, since, again, there, here,
this, that, these, those, it, its, is, are, was, were, be, been, has, have, had, does, do, did, can, could, may,
might, should, would, will, what, where, when, which, who, why, how, many, much, more, most, less, least, some, any,
all, both, each, one, two, three, four, five, six, seven, eight, nine, ten, first, second, third, other, same,
different, size, shape, side, sides, part, level, view, section, image, images, study, film, patient, history, year,
years, day, days, old, man, woman, male, female, fever, cough, pain, dyspnea, hospital, admission, treatment,
therapy, surgery, tube, line, catheter, device, position, findings, finding, impression, report, comparison,
compared, previous, prior, follow, recommended, consistent, suggest, suggestive, suspicious, due, about, also, only,
very, well, new, good, like, over, under, through, against, into, out, up, down, left side, right side, COVID,
viral, bacterial, infection, positive, negative, test, PCR, oxygen, saturation, intubated, discharged, progress. A
general reader knows that people live in houses, drive cars, eat bread, drink water and tea, walk along rivers, read
books and letters, write names and numbers, look at trees, birds, dogs, cats, horses, mountains, roads, bridges and
the sea, and talk about time, weather, work, music, money, family, friends and the world. It is said that light
comes before colour, that black and white make grey, and that a bright thing stands out from a dark ground.
"""


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer, trained on `texts` and the general text. It can encode any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (PAD, BOS, EOS, IMAGE)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*texts, *[GENERAL_TEXT, "USER: ASSISTANT: "] * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=MAX_TOKENS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Build the processor. It resizes images to the tower's square; to avoid distortion, pad them first."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(
        size=size, do_center_crop=False, crop_size=size, image_mean=list(MEAN), image_std=list(STD)
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, width: int, blocks: int) -> LlavaForConditionalGeneration:
    """Build a LLaVA with random weights: CLIP tower of 3 blocks, two-layer projector, Llama of `blocks` blocks."""
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> int:
    """Write the folder, and return its size in bytes."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.iterdir())
