"""Prompts are embedded as the models themselves embed them."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

import medalign
from medalign.config import Config
from medalign.errors import CheckpointError, ConfigError
from medalign.teacher.loading import load_teacher, require_attention
from medalign.teacher.source import CONFIG_NAME, WEIGHTS_NAME, find_teacher
from medalign.teacher.towers import tower_class
from medalign.teacher.towers.hf_bert_text import BertTextTower, bert_config
from medalign.teacher.towers.open_clip_vit import build_clip
from medalign.teacher.weights import load_exactly
from tests.unit.teacher.towers.cases import CASES, MEAN, STD, clip_model, siglip_model, write_transformers
from tests.unit.teacher.towers.test_published_layouts import facts, weights

PHANTOM = Path(medalign.__file__).parent / "assets" / "phantom_teacher"
TEXTS = ["There is a small nodule in the left upper zone.", "No nodule."]
WORDS = ["[PAD]", "[UNK]", "There", "is", "a", "nodule", "No", "small", "[END]"]


def embedded(path: Path | str) -> torch.Tensor:
    source = find_teacher(path, MEAN, STD)
    with torch.no_grad():
        return tower_class(source).embed_texts(source, TEXTS)


@pytest.mark.parametrize("own_prefix", [False, True])
@torch.no_grad()
def test_open_clip_with_a_vocabulary_of_its_own(tmp_path, own_prefix):
    config = json.loads((PHANTOM / CONFIG_NAME).read_text())["model_cfg"]
    model, state = build_clip(config).eval(), load_file(PHANTOM / WEIGHTS_NAME)
    model.load_state_dict(state)
    ids = [encoding.ids for encoding in Tokenizer.from_file(str(PHANTOM / "tokenizer.json")).encode_batch(TEXTS)]
    for name in (CONFIG_NAME, "tokenizer.json"):
        (tmp_path / name).write_bytes((PHANTOM / name).read_bytes())
    flat = [key for key in state if not key.startswith(("visual.", "logit_scale"))]
    save_file(
        {f"text.{key}" if own_prefix and key in flat else key: state[key] for key in state}, tmp_path / WEIGHTS_NAME
    )
    torch.testing.assert_close(embedded(tmp_path), model.encode_text(torch.tensor(ids)))


@torch.no_grad()
def test_open_clip_with_openais_vocabulary(tmp_path):
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    ids = open_clip.SimpleTokenizer()(TEXTS)
    torch.testing.assert_close(embedded(f"open_clip:ViT-S-32-alt/{tmp_path / 'weights.pt'}"), model.encode_text(ids))


def write_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


@pytest.mark.parametrize(("build", "padding"), [(clip_model, True), (siglip_model, "max_length")])
@torch.no_grad()
def test_transformers(tmp_path, build, padding):
    model = build()
    model.config.text_config.eos_token_id = len(WORDS) - 1
    write_transformers(tmp_path, model)
    write_tokenizer(tmp_path)
    length = model.config.text_config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(TEXTS, padding=padding, max_length=length, truncation=True, return_tensors="pt")
    kept = tokens if padding is True else {"input_ids": tokens["input_ids"]}  # SigLIP attends to its padding
    torch.testing.assert_close(embedded(tmp_path), model.get_text_features(**kept).pooler_output)


def bert_clip(prefix: str) -> tuple[dict[str, torch.Tensor], BertModel, torch.nn.Module]:
    """The weights of a text tower of BiomedBERT-base's width, with one block, as its authors name them."""
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(vocab_size=len(WORDS), num_hidden_layers=1, intermediate_size=32), add_pooling_layer=False
    )
    proj = torch.nn.Sequential(
        torch.nn.Linear(768, 24, bias=False), torch.nn.GELU(), torch.nn.Linear(24, 16, bias=False)
    )
    named = {f"{prefix}transformer.{key}": value for key, value in bert.state_dict().items()}
    return named | {f"{prefix}proj.{key}": value for key, value in proj.state_dict().items()}, bert.eval(), proj


def expected_of_bert(bert: BertModel, proj: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Texts one by one, without padding, pooled at the first token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [torch.tensor([tokenizer.encode(text).ids]) for text in TEXTS]
    return torch.cat([proj(bert(one).last_hidden_state[:, 0]) for one in ids])


@pytest.mark.parametrize("keys", [("hf_pooler_type", "hf_proj_type"), ("pooler_type", "proj")])
@torch.no_grad()
def test_biomedclip(tmp_path, keys):
    """Both names of the settings in its revisions, and the buffer that older versions of transformers kept."""
    state, bert, proj = bert_clip("text.")
    state["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    write_tokenizer(tmp_path)
    case = next(case for case in CASES if "BiomedCLIP" in case.name)
    case.write(tmp_path / "vision")
    config = json.loads((tmp_path / "vision" / CONFIG_NAME).read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"}
    config["model_cfg"]["text_cfg"] |= {keys[0]: "cls_last_hidden_state_pooler", keys[1]: "mlp"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    whole = torch.load(tmp_path / "vision" / case.weights, weights_only=True)
    visual = {key: value for key, value in whole.items() if key.startswith("visual.")}
    torch.save(visual | state | {"logit_scale": torch.ones(())}, tmp_path / case.weights)
    torch.testing.assert_close(embedded(tmp_path), expected_of_bert(bert, proj, tmp_path), rtol=1e-4, atol=1e-5)
    pixels, questions = torch.randn(2, 3, 48, 48), ["Is there a nodule?", "Is this normal?"]
    attention = load_teacher(tmp_path, text_weight=1.0)(pixels, questions)[1]
    torch.testing.assert_close(attention.sum(1), torch.ones(2))


@torch.no_grad()
def test_unimed_clip(tmp_path):
    """Its file holds no tokenizer: that of its BERT lies beside it."""
    state, bert, proj = bert_clip("module.text_encoder.")
    torch.save({"state_dict": state | {"module.logit_scale": torch.ones(())}}, tmp_path / "unimed.pt")
    path = f"open_clip:ViT-B-16-quickgelu/{tmp_path / 'unimed.pt'}"
    with pytest.raises(ConfigError, match=r"copy the tokenizer\.json of its text tower there"):
        embedded(path)
    write_tokenizer(tmp_path)
    torch.testing.assert_close(embedded(path), expected_of_bert(bert, proj, tmp_path), rtol=1e-4, atol=1e-5)
    state.pop("module.text_encoder.proj.0.weight")
    torch.save({"state_dict": state}, tmp_path / "unimed.pt")
    with pytest.raises(CheckpointError, match=r"not a BiomedBERT with a projection.* text_encoder\.proj\.0\.weight"):
        embedded(path)


@pytest.mark.parametrize(("name", "prefix"), [("unimed-clip", "text_encoder."), ("biomedclip", "text.")])
def test_the_published_text_towers_fit(shared, name, prefix):
    content = facts(shared, name)
    for published in list(content["files"].values()) if name == "unimed-clip" else [content]:
        state = {key: value for key, value in weights(published["parameters"]).items() if key.startswith(prefix)}
        with torch.device("meta"):
            config = bert_config(state, prefix, Path("published.pt"))
            first, last = (state[f"{prefix}proj.{i}.weight"] for i in (0, 2))
            tower = BertTextTower(config, first.shape[0], last.shape[0])
        load_exactly(tower, state, Path("published.pt"), prefix=prefix, others=())


def test_a_teacher_without_texts_cannot_follow_a_question(tmp_path):
    dino, vision = (next(case for case in CASES if key in case.name) for key in ("DINOv2", "CLIP vision model"))
    dino.write(tmp_path / "dino")
    (tmp_path / "dino" / "model.safetensors").unlink()  # it is refused before the weights are read
    config = Config()
    config.teacher.path, config.teacher.text_weight = str(tmp_path / "dino"), 0.5
    for refused in (lambda: load_teacher(config.teacher.path, text_weight=0.5), lambda: require_attention(config)):
        with pytest.raises(ConfigError, match=r"trained without texts, but teacher\.text_weight is 0\.5; set it to 0"):
            refused()
    vision.write(tmp_path / "vision")
    with pytest.raises(ConfigError, match="a clip_vision_model has no text tower"):
        load_teacher(tmp_path / "vision", text_weight=0.5)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / name).write_bytes((PHANTOM / name).read_bytes())
    with pytest.raises(ConfigError, match=r"its vocabulary has 56 words, but .*tokenizer\.json cannot be read"):
        load_teacher(tmp_path, text_weight=1.0)
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.json has 9 words, but its text tower has 56"):
        load_teacher(tmp_path, text_weight=1.0)


def test_missing_weights_of_the_text_tower_are_listed(tmp_path):
    for name in (CONFIG_NAME, "tokenizer.json"):
        (tmp_path / name).write_bytes((PHANTOM / name).read_bytes())
    state = load_file(PHANTOM / WEIGHTS_NAME)
    del state["ln_final.bias"]
    save_file(state, tmp_path / WEIGHTS_NAME)
    load_teacher(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing: ln_final\.bias"):
        load_teacher(tmp_path, text_weight=1.0)


def test_a_text_tower_that_would_be_downloaded_is_refused(tmp_path):
    (tmp_path / WEIGHTS_NAME).write_bytes((PHANTOM / WEIGHTS_NAME).read_bytes())
    config = json.loads((PHANTOM / CONFIG_NAME).read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "microsoft/some-bert"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="its text tower is microsoft/some-bert with pooler None; supported"):
        load_teacher(tmp_path, text_weight=1.0)
