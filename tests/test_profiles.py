"""Named profiles of a family.toml: who may choose one and where, what goes before what, and members that it needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_dlf import FamilyError, FusedLlama, InvalidParameterError
from edge_dlf.batch import run_file
from edge_dlf.cli import main
from edge_dlf.families.library import write_family
from edge_dlf.families.spec import FamilySpec
from edge_dlf.server import Rules

from .fake_llm import FakeLlama, fake_session
from .http_server import Served, serving

PAIR = {"large": 0.5, "tuned": 0.7}
OTHER = {"base": 1.0, "lora": -0.2}
HELLO = [{"role": "user", "content": "The hen is in the inn."}]
UNKNOWN = "there is no profile 'nobody'; there are support, sums, lora"


@pytest.fixture(scope="module")
def family(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny family, by default its large model alone, with profiles; one has the name of an expert."""
    folder = tmp_path_factory.mktemp("profiles")
    for file in tiny.glob("*.gguf"):
        shutil.copy(file, folder)
    (folder / "family.toml").write_text(
        (tiny / "family.toml").read_text()
        + 'method = "large"\n'
        + '[profiles.support]\nmethod = "weighted"\nweights = { large = 0.5, tuned = 0.7 }\n'
        + '[profiles.sums]\nmethod = "weighted"\nweights = { base = 1.0, lora = -0.2 }\nrepeat_penalty = 1.5\n'
        + '[profiles.lora]\nmethod = "static"\nalpha = 0.5\n'
    )
    return folder


@pytest.fixture(scope="module")
def llm(family: Path) -> Iterator[FusedLlama]:
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1, n_parallel=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: FusedLlama) -> Iterator[Served]:
    with serving(llm) as server:
        yield server


def tokens(llm: FusedLlama, **settings: Any) -> list[tuple[int, float]]:
    return [
        (token.id, pytest.approx(token.logprob, abs=5e-3)) for token in llm.stream("The hen", max_tokens=9, **settings)
    ]


def weighted(weights: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"method": "weighted", "weights": weights, **more}


def test_a_request_chooses_a_profile_and_may_change_it(llm: FusedLlama, tiny_llm: FusedLlama) -> None:
    assert tokens(llm) == tokens(tiny_llm, method="large")
    for chosen, plain in (
        ({"profile": "support"}, weighted(PAIR)),
        ({"profile": None}, {"method": "large"}),
        ({"profile": "sums"}, weighted(OTHER, repeat_penalty=1.5)),
        ({"profile": "sums", "repeat_penalty": 1.0}, weighted(OTHER)),
        ({"profile": "support", "method": "dynamic"}, {"method": "dynamic"}),
        ({"profile": "support", "weights": OTHER}, weighted(OTHER)),
    ):
        assert tokens(llm, **chosen) == tokens(tiny_llm, **plain)
    scores = [dict(each.score([("The", [65, 66])], **chosen)) for each, chosen in
              ((llm, {"profile": "support"}), (tiny_llm, weighted(PAIR)))]  # fmt: skip
    assert scores[0][0].logprob == pytest.approx(scores[1][0].logprob, abs=5e-3)


def test_a_profile_chosen_at_load_holds_for_requests_without_one(family: Path, tiny_llm: FusedLlama) -> None:
    with FusedLlama.from_family(family, profile="sums", n_ctx=256, n_threads=1) as llm:
        assert list(llm.driver.decoder.ensemble.members) == ["base", "lora"]
        assert tokens(llm) == tokens(tiny_llm, **weighted(OTHER, repeat_penalty=1.5))
        # Another profile takes its place: nothing of `sums` is left, and the members that it lacks are loaded.
        assert tokens(llm, profile="support") == tokens(tiny_llm, **weighted(PAIR))
        assert list(llm.driver.decoder.ensemble.members) == ["large", "base", "lora", "tuned"]


def test_an_unknown_profile_is_refused_with_those_there_are(
    llm: FusedLlama, tiny_llm: FusedLlama, family: Path
) -> None:
    with pytest.raises(InvalidParameterError, match=UNKNOWN):
        llm.stream("Hi", profile="nobody")
    with pytest.raises(InvalidParameterError, match=UNKNOWN):
        FusedLlama.from_family(family, profile="nobody")
    with pytest.raises(InvalidParameterError, match="no profile 'support'; the family has none"):
        tiny_llm.stream("Hi", profile="support")
    with pytest.raises(InvalidParameterError, match=r"no profile \['support'\]"):
        llm.stream("Hi", profile=["support"])


def texts(llm: FusedLlama, rows: list[dict[str, Any]], **settings: Any) -> list[str]:
    results = llm.batch(rows, ordered=True, max_tokens=9, **settings)
    return [r["response"]["body"]["choices"][0]["text"] if r["response"] else r["error"]["message"] for r in results]


def test_a_row_of_a_batch_chooses_its_own(llm: FusedLlama, tiny_llm: FusedLlama) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "The hen", "profile": "support"},
        {"prompt": "The hen", "profile": "sums", "edge_dlf": {"method": "large"}},
        {"prompt": "The hen"},
        {"prompt": "The hen", "profile": "nobody"},
    ]
    plain = [{"prompt": "The hen", "edge_dlf": settings} for settings in (weighted(PAIR), {"method": "large"})]
    support, large = texts(tiny_llm, plain)
    (penalised,) = texts(tiny_llm, plain[1:], repeat_penalty=1.5)
    assert texts(llm, rows) == [support, penalised, large, UNKNOWN]
    # A row's profile goes before the settings of the batch, and a profile of the batch is for rows that name none.
    assert texts(llm, rows[:1], method="dynamic") == [support]
    assert texts(llm, [rows[2], rows[1]], profile="support") == [support, penalised]


def test_a_run_does_not_continue_under_other_profiles(family: Path, llm: FusedLlama, tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text('{"prompt": "The", "max_tokens": 2}\n')
    run_file(llm, questions, answers, profile="support")
    with pytest.raises(InvalidParameterError, match='method was "weighted", now "static"'):
        run_file(llm, questions, answers, profile="lora")
    text = (family / "family.toml").read_text().replace("alpha = 0.5", "alpha = 0.75")
    copy = tmp_path / "copy"
    shutil.copytree(family, copy)
    (copy / "family.toml").write_text(text)
    with (
        FusedLlama.from_family(copy, n_ctx=256, n_threads=1) as other,
        pytest.raises(InvalidParameterError, match="profiles was"),
    ):
        run_file(other, questions, answers, profile="support")


def test_a_server_offers_each_profile_as_a_model(server: Served, tiny_llm: FusedLlama) -> None:
    models = server.get("/v1/models").json()["data"]
    names = ["", ":dynamic", ":static", ":blend", ":large", ":lora", ":tuned", ":support", ":sums"]
    assert [model["id"] for model in models] == [f"tiny{name}" for name in names]
    assert {tuple(model["experts"]) for model in models} == {("lora", "tuned")}

    def ask(**fields: Any) -> dict[str, Any]:
        body = {"messages": HELLO, "max_tokens": 9, "temperature": 0, **fields}
        answer: dict[str, Any] = server.post("/v1/chat/completions", json=body).json()
        return answer

    expected = tiny_llm.create_chat_completion(HELLO, max_tokens=9, temperature=0, **weighted(PAIR))
    for fields in ({"model": "tiny:support"}, {"profile": "support"}, {"model": "tiny:sums", "profile": "support"}):
        answer = ask(**fields)
        assert answer["choices"][0]["message"] == expected["choices"][0]["message"]  # type: ignore[index]
        assert answer["edge_dlf"]["method"] == "weighted"
    assert ask(model="tiny:lora")["edge_dlf"]["method"] == "static"
    assert ask(model="tiny:support", edge_dlf={"method": "lora"})["edge_dlf"]["method"] == "lora"

    assert ask(model="tiny:large", profile="support")["edge_dlf"]["method"] == "large"
    assert ask(profile="nobody")["error"]["message"] == UNKNOWN
    assert ask(edge_dlf={"profile": "support"})["error"]["code"] == "invalid_value"
    schemas = server.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]["requestBody"]
    assert "profile" in schemas["content"]["application/json"]["schema"]["properties"]


def test_a_profile_goes_before_the_server_s_own_method(family: Path) -> None:
    rules = Rules({"method": "large", "max_tokens": 2})
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1) as llm, serving(llm, rules) as server:
        described = server.get("/v1/models/tiny:support").json()
        answer = server.post("/v1/chat/completions", json={"model": "tiny:support", "messages": HELLO}).json()
        assert described["method"] == answer["edge_dlf"]["method"] == "weighted"


def cli(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--threads", "1", "--ctx-size", "256"], env=env)


def test_commands_choose_one_by_name(family: Path, tmp_path: Path) -> None:
    def method(*more: object, env: dict[str, str] | None = None) -> str:
        result = cli("generate", "Hi", "-f", family, "--json", "--max-tokens", 3, *more, env=env)
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)["edge_dlf"]["method"])

    assert method() == "large"
    assert method("--profile", "support") == "weighted"
    assert method(env={"EDGE_DLF_PROFILE": "lora"}) == "static"
    assert method("--profile", "support", "--method", "dynamic") == "dynamic"
    compared = cli("compare", "Hi", "-f", family, "--max-tokens", 3, "--json", "--profile", "support")
    assert set(json.loads(compared.stdout)) == {"large", "lora", "tuned", "static", "blend", "weighted", "dynamic"}
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text('{"prompt": "Hi", "max_tokens": 2}\n{"prompt": "Hi", "max_tokens": 2, "profile": "lora"}\n')
    done = cli("batch", questions, "-o", answers, "-f", family, "--profile", "support", "--ordered")
    assert done.exit_code == 0, done.output
    found = [json.loads(line)["response"]["body"]["edge_dlf"]["method"] for line in answers.read_text().splitlines()]
    assert found == ["weighted", "static"]


@pytest.mark.parametrize("command", [("generate", "Hi"), ("chat",), ("compare", "Hi"), ("serve",)])
def test_commands_refuse_an_unknown_one(family: Path, command: tuple[str, ...]) -> None:
    result = cli(*command, "-f", family, "--profile", "nobody")
    assert (result.exit_code, result.stderr) == (2, f"edge-dlf: {UNKNOWN}\n")


def test_show_tells_them(family: Path) -> None:
    text = CliRunner().invoke(main, ["show", str(family)]).stdout
    assert "profile support" in text
    assert "method = weighted, weights = large=0.5,tuned=0.7" in text
    told = json.loads(CliRunner().invoke(main, ["show", str(family), "--json"]).stdout)
    assert told["profiles"]["support"] == weighted(PAIR)


def test_a_chat_changes_it(capsys: pytest.CaptureFixture[str]) -> None:
    from edge_dlf.cli.chat import handle

    llm = FakeLlama(["x"])
    session = fake_session(llm, defaults={"method": "large"}, profiles={"mine": {"method": "static", "alpha": 0.5}})
    handle(session, "/set profile mine")
    assert (session.value("method"), session.value("alpha")) == ("static", 0.5)
    handle(session, "Hi")
    assert llm.requests[-1][1] == {"profile": "mine"}
    handle(session, "/set profile default")
    assert session.value("method") == "large"
    with pytest.raises(InvalidParameterError, match="no profile 'nobody'; there are mine"):
        handle(session, "/set profile nobody")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("profiles = 3", "profiles must be tables"),
        ("profiles = {a = 3}", "profiles.a must be a table"),
        ("profiles = {dynamic = {}}", "a profile cannot be named 'dynamic'"),
        ('profiles = {"a:b" = {}}', "a profile's name must have letters"),
        ("profiles = {a = {n_ctx = 3}}", "[profiles.a] has the unknown key 'n_ctx'"),
        ("profiles = {a = {temperature = -1}}", "temperature must be 0 or more"),
        ('profiles = {a = {method = "weighted"}}', "[profiles.a]: method weighted needs weights"),
        ('profiles = {a = {method = "nobody"}}', "[profiles.a]: method must be one of"),
    ],
)
def test_bad_profiles_are_refused_with_their_reason(tiny: Path, tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "family.toml").write_text(f"{table}\n{(tiny / 'family.toml').read_text()}")
    with pytest.raises(FamilyError) as caught:
        FamilySpec.load(tmp_path)
    assert message in str(caught.value)


def test_a_family_is_written_with_its_profiles(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_DLF_MODELS", str(tmp_path))
    spec = FamilySpec.load(family)
    assert FamilySpec.load(write_family(spec)).profiles == spec.profiles
