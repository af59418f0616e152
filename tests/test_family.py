"""`family.toml`: what is read from a good one, and the one clear reason for every bad one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_dlf import FamilyError, InvalidParameterError, LoadError, VocabMismatchError
from edge_dlf.families.files import check_files
from edge_dlf.families.spec import ExpertSpec, FamilySpec, ModelSource
from edge_dlf.system.paths import models_dir

from . import tiny
from .tiny import tiny_model

HEAD = 'name = "f"\n[large]\npath = "large.gguf"\n[base]\npath = "base.gguf"\n'
EXPERT = '[[experts]]\nname = "maths"\npath = "maths.gguf"\n'


def write(folder: Path, content: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "family.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def reason(folder: Path, content: str | bytes) -> str:
    path = write(folder, content)
    with pytest.raises(FamilyError) as caught:
        FamilySpec.load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_examples_and_the_hash_of_a_local_file(tmp_path: Path) -> None:
    sha256 = "0123456789abcdef" * 4
    head = HEAD.replace('"base.gguf"', f'"base.gguf"\nsha256 = "{sha256}"')
    write(tmp_path, f'examples = ["Why?", "How?"]\n{head}{EXPERT}sha256 = "{sha256}"\n')
    spec = FamilySpec.load(tmp_path)
    assert spec.examples == ("Why?", "How?")
    assert (spec.large.sha256, spec.base.sha256) == ((), (sha256,))
    assert spec.experts[0].files == ((ModelSource(tmp_path / "maths.gguf", sha256=(sha256,)), None),)


def test_a_family(tmp_path: Path) -> None:
    write(
        tmp_path,
        f'{HEAD}{EXPERT}[[experts]]\nname = "law"\nlora = "law.gguf"\nscale = 0.5\n'
        '[[experts]]\nname = "both"\nlora = ["a.gguf", "/b.gguf"]\nscale = [1, -2.5]\n'
        '[[experts]]\nname = "hub"\nrepo = "o/r"\nfile = "x.gguf"\nrevision = "main"\n'
        '[defaults]\nmethod = "law"\ntemperature = 0\ntop_k = 20\nseed = 7\n'
        "[defaults.alpha]\nmaths = 1\n[defaults.logit_bias]\n5 = -inf\n6 = 2\n",
    )
    spec = FamilySpec.load(tmp_path)
    assert spec == FamilySpec.load(tmp_path / "family.toml") == FamilySpec.load(str(tmp_path))
    assert spec.name == "f"
    assert (spec.large, spec.base) == (ModelSource(tmp_path / "large.gguf"), ModelSource(tmp_path / "base.gguf"))
    assert spec.experts == (
        ExpertSpec("maths", ((ModelSource(tmp_path / "maths.gguf"), None),)),
        ExpertSpec("law", ((ModelSource(tmp_path / "law.gguf"), 0.5),)),
        ExpertSpec("both", ((ModelSource(tmp_path / "a.gguf"), 1.0), (ModelSource(Path("/b.gguf")), -2.5))),
        ExpertSpec("hub", ((ModelSource(repo="o/r", file="x.gguf", revision="main"), None),)),
    )
    assert spec.defaults == {
        "method": "law",
        "temperature": 0.0,
        "top_k": 20,
        "seed": 7,
        "alpha": {"maths": 1.0},
        "logit_bias": {5: float("-inf"), 6: 2.0},
    }


def test_a_file_of_a_repository_is_not_here_yet(tmp_path: Path) -> None:
    assert ModelSource(tmp_path / "x.gguf").local_path() == tmp_path / "x.gguf"
    with pytest.raises(FamilyError, match=r"x\.gguf of o/r is not on this machine; `edge-dlf pull` downloads it"):
        ModelSource(repo="o/r", file="x.gguf").local_path()


def test_home_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "f", HEAD.replace("large.gguf", "~/large.gguf") + EXPERT)
    assert FamilySpec.load("~/f").large.local_path() == tmp_path / "large.gguf"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("name = ", "is not valid TOML: "),
        (b"GGUF\3\0\0\0", "is a model; a family is made of several"),
        ("a = " + "[" * 5000, "is not valid TOML: "),
        (b"name = '\xff'", "is not valid TOML"),
        (b"#" * (1 << 20) + b"#", "is larger than 1 MiB, so it is no family.toml"),
        ("", "name must have letters, digits, '.', '_' and '-', and begin with a letter or digit, not None"),
        (HEAD.replace('"f"', '""'), "name must have letters"),
        (HEAD.replace('"f"', '"../f"'), "name must have letters"),
        (HEAD.replace('"f"', "3"), "name must have letters"),
        ('name = "f"\nlarge = "x.gguf"', "needs a table [large]"),
        ('name = "f"\n[large]\npath = "x.gguf"', "needs a table [base]"),
        ('colour = "red"\n' + HEAD + EXPERT, "the file has the unknown key 'colour'"),
        ('examples = "Why?"\n' + HEAD + EXPERT, "examples must be a list of prompts"),
        ("examples = [3]\n" + HEAD + EXPERT, "an example must be a non-empty string, not 3"),
        (HEAD + EXPERT + "sha256 = 'x'", "sha256 of expert 'maths' must be 64 hexadecimal digits"),
        (HEAD, "has no expert; it needs at least one"),
        ("experts = []\n" + HEAD, "has no expert; it needs at least one"),
        ('experts = ["maths.gguf"]\n' + HEAD, "experts must be tables, [[experts]]"),
        (HEAD + "[experts.maths]\npath = 'x.gguf'", "experts must be tables, [[experts]]"),
        (HEAD + EXPERT + EXPERT, "two experts are named 'maths'"),
        (HEAD + EXPERT.replace("maths", "large"), "an expert cannot be named 'large': that is a role or a method"),
        (HEAD + EXPERT.replace("maths", "static"), "an expert cannot be named 'static': that is a role or a method"),
        (HEAD + EXPERT.replace("maths", "a b"), "an expert's name must have letters"),
        (HEAD + EXPERT.replace("maths", "-x"), "an expert's name must have letters"),
        (HEAD + "[[experts]]\npath = 'x.gguf'", "and begin with a letter or digit, not None"),
        (HEAD + "[[experts]]\nname = 'm'", "expert 'm' needs a path, or a repo and a file"),
        (HEAD + "[[experts]]\nname = 'm'\npath = ''", "the path of expert 'm' must be a non-empty string, not ''"),
        (HEAD + "[[experts]]\nname = 'm'\npath = 3", "the path of expert 'm' must be a non-empty string, not 3"),
        (HEAD + EXPERT + "lora = 'x.gguf'", "expert 'maths', which has a lora, has the unknown key 'path'"),
        (HEAD + EXPERT + "repo = 'o/r'", "expert 'maths', which has a path, has the unknown key 'repo'"),
        (HEAD + EXPERT + "scale = 1.0", "expert 'maths', which has a path, has the unknown key 'scale'"),
        (HEAD + "[[experts]]\nname = 'm'\nlora = []", "expert 'm' needs a file, or [(LoRA, scale), …]"),
        (HEAD + "[[experts]]\nname = 'm'\nlora = ['a', 'b']\nscale = [1]", "expert 'm' has 2 in lora and 1 in scale"),
        (HEAD + "[[experts]]\nname = 'm'\nlora = 'a'\nscale = 'big'", "a scale of expert 'm' must be a finite number"),
        (HEAD + "[[experts]]\nname = 'm'\nlora = 'a'\nscale = nan", "a scale of expert 'm' must be a finite number"),
        (HEAD + f"[[experts]]\nname = 'm'\nlora = 'a'\nscale = 1{'0' * 400}", "must be a finite number"),
        (HEAD + "[[experts]]\nname = 'm'\nlora = 'a'\nscale = true", "must be a finite number, not True"),
        (HEAD + "[[experts]]\nname = 'm'\nlora = [1]", "the path of expert 'm' must be a non-empty string, not 1"),
        (HEAD + "[[experts]]\nname = 'm'\nrepo = 'o/r'", "expert 'm' needs a path, or a repo and a file"),
        (HEAD + "[[experts]]\nname = 'm'\nrepo = 'o/r'\nfile = 'x.gguf'\nsha256 = '0'", "must be 64 hexadecimal"),
        (HEAD + "[[experts]]\nname = 'm'\nrepo = 'o'\nfile = 'x.gguf'", "'o' is no repository of the hub"),
        (HEAD + "[[experts]]\nname = 'm'\nrepo = '../r'\nfile = 'x.gguf'", "'../r' is no repository of the hub"),
        (HEAD + "[[experts]]\nname = 'm'\nrepo = 'o/r'\nfile = '../x.gguf'", "'../x.gguf' is no name of a GGUF file"),
        (HEAD + "[[experts]]\nname = 'm'\nrepo = 'o/r'\nfile = '/x.gguf'", "'/x.gguf' is no name of a GGUF file"),
        (HEAD + "[[experts]]\nname = 'm'\nrepo = 'o/r'\nfile = 'x'", "'x' is no name of a GGUF file"),
        (
            HEAD + "[[experts]]\nname = 'm'\nrepo = 'o/r'\nfile = 'x.gguf'\nrevision = '../../x'",
            "'../../x' is no revision",
        ),
        (
            HEAD + f"[[experts]]\nname = 'm'\nrepo = 'o/r'\nfile = 'x.gguf'\nsha256 = ['{'0' * 64}', '{'1' * 64}']",
            "expert 'm' has 2 in sha256 and 1 files",
        ),
        (HEAD + EXPERT + "[defaults]\ncolour = 1", "[defaults] has the unknown key 'colour'"),
        (HEAD + EXPERT + "[defaults]\nmax_tokens = 1", "[defaults] has the unknown key 'max_tokens'"),
        (HEAD + EXPERT + "[defaults]\ntemperature = 'hot'", "temperature must be a finite number, not 'hot'"),
        (HEAD + EXPERT + "[defaults]\ntemperature = -1", "temperature must be 0 or more, not -1"),
        (HEAD + EXPERT + "[defaults]\ntop_k = 1.5", "top_k must be an integer, not 1.5"),
        (HEAD + EXPERT + "[defaults]\nseed = true", "seed must be an integer, not True"),
        (
            HEAD + EXPERT + "[defaults]\nmethod = 'magic'",
            "method must be one of dynamic, static, blend, weighted, large, base, maths, not",
        ),
        (HEAD + EXPERT + "[defaults]\nsearch = 'best'", "search must be one of grid, exact, not 'best'"),
        (HEAD + EXPERT + "[defaults]\nalpha = {law = 1}", "alpha names 'law'; the experts are maths"),
        (HEAD + EXPERT + "[defaults]\nweights = {law = 1}", "weights names 'law'; the members are large, base, maths"),
        (HEAD + EXPERT + "[defaults]\nweights = 1", "weights must be NAME=NUMBER,…, not 1"),
        (HEAD + EXPERT + "[defaults]\nmethod = 'weighted'", "method weighted needs weights of members"),
        (HEAD + EXPERT.replace("maths", "weighted"), "an expert cannot be named 'weighted'"),
        (HEAD + EXPERT + "[defaults]\nlogit_bias = {x = 1}", "logit_bias must map token ids to numbers"),
        (HEAD + EXPERT + "[defaults]\nlogit_bias = {5 = 'x'}", "logit_bias of 5 must be a finite number, not 'x'"),
        ("defaults = 3\n" + HEAD + EXPERT, "defaults must be a table, [defaults]"),
        (".".join(["a"] * 100_000) + " = 1\n", "a line with more than 1000 dots"),
        (HEAD + "".join(f'[[experts]]\nname="a{n}"\n' for n in range(30_000)), "has 30000 experts, more than 1000"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert expected in reason(tmp_path, content)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, b"\xef\xbb\xbf" + (HEAD + EXPERT).encode())
    assert FamilySpec.load(tmp_path).name == "f"
    assert "is not valid TOML" in reason(tmp_path, b"\xef\xbb\xbf" * 2 + (HEAD + EXPERT).encode())


@pytest.mark.parametrize(
    ("token", "is_padding"),
    [
        *((token, True) for token in ("<pad>", "[PAD]", "<|PAD_TOKEN|>", "<|pad|>", "<PAD>", "[pad_3]", "<|padding|>")),
        *((token, True) for token in ("<|vision_pad|>", "<|finetune_right_pad_id|>", "<unused7>", "[PAD311]")),
        *((token, False) for token in ("pad", "[notepad]", "<padlock>", "[MYTOOL]", "<|im_pad_end|>")),
    ],
)
def test_a_fine_tune_may_have_one_more_token_for_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, is_padding: bool
) -> None:
    tiny_model(tmp_path / "base.gguf", n_embd=16, n_layer=1)
    texts, types = tiny.bpe_vocabulary()
    monkeypatch.setattr(tiny, "bpe_vocabulary", lambda: ([*texts, token], [*types, 3 if is_padding else 1]))
    tiny_model(tmp_path / "tuned.gguf", n_embd=16, n_layer=1)
    family = FamilySpec.from_files(tmp_path / "base.gguf", tmp_path / "base.gguf", {"x": tmp_path / "tuned.gguf"})
    if is_padding:
        assert check_files(family).n_vocab == len(texts)
    else:
        with pytest.raises(VocabMismatchError, match="where the other has ended"):
            check_files(family)


def test_a_family_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_DLF_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    write(tmp_path / "qwen-maths", HEAD + EXPERT)
    assert models_dir() == tmp_path
    assert FamilySpec.load("qwen-maths").large.path == tmp_path / "qwen-maths" / "large.gguf"
    with pytest.raises(FamilyError, match="^nowhere: no such family; looked for nowhere, ") as caught:
        FamilySpec.load("nowhere")
    assert str(tmp_path / "nowhere" / "family.toml") in str(caught.value)
    for family in ("../qwen-maths", tmp_path / "nowhere"):
        with pytest.raises(FamilyError, match="no such family"):
            FamilySpec.load(family)


def test_without_the_variable_families_are_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_DLF_MODELS", raising=False)
    assert models_dir().parts[-2:] == ("edge-dlf", "models")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="~nobody_at_all/x: there is no such home folder"):
        FamilySpec.load("~nobody_at_all/x")
    with pytest.raises(InvalidParameterError, match="there is no such home folder"):
        FamilySpec.from_files("~nobody_at_all/x", "b.gguf", {"e": "e.gguf"})


def test_a_fifo_and_a_null_byte(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FamilyError, match="is not a regular file"):
        FamilySpec.load(tmp_path / "fifo")
    with pytest.raises(FamilyError, match="no such family|null"):
        FamilySpec.load("a\0b")


def test_a_family_of_files() -> None:
    spec = FamilySpec.from_files(
        "l.gguf", Path("b.gguf"), {"maths": "m.gguf", "both": [("x.gguf", 1), ("y.gguf", 0.5)]}
    )
    assert (spec.name, spec.large, spec.base) == ("l", ModelSource(Path("l.gguf")), ModelSource(Path("b.gguf")))
    assert spec.experts == (
        ExpertSpec("maths", ((ModelSource(Path("m.gguf")), None),)),
        ExpertSpec("both", ((ModelSource(Path("x.gguf")), 1.0), (ModelSource(Path("y.gguf")), 0.5))),
    )
    assert spec.defaults == {}


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ({}, "has no expert"),
        ({"large": "x"}, "cannot be named 'large'"),
        ({"a/b": "x"}, "must have letters"),
        ({"m": ""}, "the path of expert 'm' must be a non-empty string"),
        ({"m": []}, "expert 'm' needs a file, or"),
        ({"m": 3}, "expert 'm' needs a file, or"),
        ({"m": ["x.gguf"]}, "expert 'm' needs pairs"),
        ({"m": [("x.gguf", "big")]}, "a scale of expert 'm' must be a finite number"),
    ],
)
def test_bad_files_are_refused(experts: dict[str, object], expected: str) -> None:
    with pytest.raises(InvalidParameterError, match=expected):
        FamilySpec.from_files("l.gguf", "b.gguf", experts)  # type: ignore[arg-type]


VALUES = r"""
1 -1 1.5 nan -inf true '' '\u0000' "\u0000" "a\nb" '../../etc/passwd' '~nobody_x/y' '/dev/zero' '/dev/stdin' [] [[]] {}
{a=1} 1979-05-27 07:32:00 9223372036854775808 1e400 ['a','b'] [1,2] 'large' [{}] [[[[[]]]]]
""".split()  # noqa: SIM905
BAD = st.sampled_from([*VALUES, "1" * 5000, "'" + "x" * 5000 + "'"])
BAD_SOURCE = st.builds(
    "{{{}={}{}}}".format, st.sampled_from(["path", "repo", "file", "sha256"]), BAD, st.just(", file='f'")
)
BAD_EXPERT = st.builds("[{{name='e', {}={}}}]".format, st.sampled_from(["name", "lora", "path", "scale"]), BAD)
BAD_SETTING = st.builds(
    "{{{}={}}}".format, st.sampled_from(["temperature", "top_k", "alpha", "logit_bias", "method", "seed"]), BAD
)
TABLES = {
    "name": BAD,
    "large": BAD | BAD_SOURCE,
    "base": BAD | BAD_SOURCE,
    "experts": BAD | BAD_EXPERT,
    "defaults": BAD | BAD_SETTING,
}
GOOD = {"name": "'f'", "large": "{path='l'}", "base": "{path='b'}", "experts": "[{name='e', lora='e'}]"}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional=TABLES))
def test_whatever_the_file_holds_it_is_a_family_or_refused_in_one_line(tmp_path: Path, bad: dict[str, str]) -> None:
    (tmp_path / "family.toml").write_text("\n".join(f"{key} = {value}" for key, value in {**GOOD, **bad}.items()))
    try:
        check_files(FamilySpec.load(tmp_path))
    except LoadError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        pytest.fail("there are no such files")
