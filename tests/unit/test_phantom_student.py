"""The packaged base student is an ordinary local model folder."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import medalign
from medalign.geometry import PreprocessCfg, square_canvas

FOLDER = Path(medalign.__file__).parent / "assets" / "phantom_student"
LIMIT_BYTES = 15 * 2**20


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval()


@pytest.fixture
def image():
    return Image.linear_gradient("L").resize((90, 120))


def conversation(question: str, images: int = 1) -> list[dict]:
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_the_folder_is_small_and_contains_no_pickle():
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize(
    "text",
    ["Is there a nodule?", "T2-weighted MRI, 5 mm \N{MULTIPLICATION SIGN} 3", "émphysème \N{LUNGS} 肺炎\n\ttab  two"],
)
def test_the_tokenizer_writes_any_text(processor, text):
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == text


def test_special_tokens_are_single_and_distinct(processor, model):
    tokenizer = processor.tokenizer
    specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    image = tokenizer.encode("<image>", add_special_tokens=False)
    assert image == [model.config.image_token_id]
    assert len({*specials, *image}) == 4


def test_the_chat_template_renders_prompts_and_answers(processor):
    turns = conversation("Is there a nodule?")
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "<s>USER: <image>\nIs there a nodule? ASSISTANT:"
    )
    turns.append({"role": "assistant", "content": [{"type": "text", "text": "yes"}]})
    assert processor.apply_chat_template(turns) == "<s>USER: <image>\nIs there a nodule? ASSISTANT: yes</s>"
    assert processor.apply_chat_template(conversation("And now?", images=0)) == "<s>USER: And now? "


def test_prompt_tokens_do_not_depend_on_the_answer_that_follows(processor):
    turns = conversation("Where is the nodule?")
    prompt = processor.tokenizer.encode(processor.apply_chat_template(turns, add_generation_prompt=True))
    turns.append({"role": "assistant", "content": "right upper zone"})
    whole = processor.tokenizer.encode(processor.apply_chat_template(turns))
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == processor.tokenizer.eos_token_id


def test_the_processor_gives_one_token_per_patch_and_the_pixels_of_the_canvas(processor, model, image):
    text = processor.apply_chat_template(conversation("Is there a nodule?"), add_generation_prompt=True)
    canvas = square_canvas(image)
    inputs = processor(images=canvas, text=text, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
    images = processor.image_processor
    ours = PreprocessCfg(model.config.vision_config.image_size, images.image_mean, images.image_std).view(canvas)
    # The processor resizes on 8-bit tensors, the view with Pillow: they may differ by a few gray levels.
    assert (inputs["pixel_values"][0] - ours).abs().max() < 8 / 255 / images.image_std[0]


def test_generation_is_the_same_alone_and_in_a_batch_with_a_longer_prompt(processor, model, image):
    texts = [
        processor.apply_chat_template(conversation(question), add_generation_prompt=True)
        for question in ("Is there a disc?", "What shape lies at the top left of this whole picture?")
    ]
    images = [[square_canvas(image)]] * 2
    both = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
    one = processor(images=images[:1], text=texts[:1], return_tensors="pt")
    with torch.no_grad():
        answers = [model.generate(**inputs, max_new_tokens=5, do_sample=False) for inputs in (both, one)]
    batch = answers[0][0, both["input_ids"].shape[1] :].tolist()
    single = answers[1][0, one["input_ids"].shape[1] :].tolist()
    assert batch[: len(single)] == single
    assert single
