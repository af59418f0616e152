"""Correctors: experts whose logits are added to the large model's as they are, so that no base is decoded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_dlf import FamilyError, FusedLlama, FusionParams, InvalidParameterError, SamplingParams
from edge_dlf.cli import main
from edge_dlf.engine.backend import Run
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble, Roles
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.evidence import bench, tune
from edge_dlf.families.files import check_files
from edge_dlf.families.manifest import Manifest
from edge_dlf.families.plan import Planner
from edge_dlf.families.spec import FamilySpec
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.fusion.records import Pick
from edge_dlf.server.app import models_of
from edge_dlf.system.machine import GPU, Machine

from .fake_backend import FakeBackend
from .naive import log_softmax
from .test_tune import drawn
from .tiny import tiny_lora, tiny_model

N_VOCAB = 50
GREEDY = SamplingParams(temperature=0.0, seed=0)
PROMPT = "Once upon a time"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGE_DLF_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("EDGE_DLF_FAMILY", raising=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def text(result: Any) -> str:
    return str(result["choices"][0]["text"])


class TestEngine:
    """On scripted members, against the equation in NumPy."""

    NAMES = "large", "base", "law", "fix", "mend"

    def generate(
        self, fusion: FusionParams, n_draft: int | None = 0, names: tuple[str, ...] = NAMES, common: float = 0.0
    ) -> tuple[list[Pick], dict[str, FakeBackend]]:
        members = {name: FakeBackend(seed, N_VOCAB) for seed, name in enumerate(names)}
        for member in members.values():
            member.common = common
        decoder = Decoder(Ensemble(members, N_VOCAB, correctors=("fix", "mend")), Fuser(N_VOCAB))
        prompts = {name: [1, 2] for name in members}
        roles = decoder.ensemble.roles(fusion)
        generation = Generation(
            GenerationRequest(roles, prompts, fusion, GREEDY, max_tokens=20, n_draft=n_draft, traced=True)
        )
        decoder.begin(generation)
        picks: list[Pick] = []
        while len(picks) < 20:
            (result,) = decoder.step([generation])
            assert not result.error
            picks += result.picks
        return picks, members

    @pytest.mark.parametrize(
        ("alpha", "weights"),
        [
            ({"fix": 1.0}, {"large": 1.0, "fix": 1.0}),
            ({"fix": 0.4, "mend": -0.3}, {"large": 1.0, "fix": 0.4, "mend": -0.3}),
            ({"fix": 0.5, "law": 0.8}, {"large": 1.0, "base": -0.8, "law": 0.8, "fix": 0.5}),
            ({"law": 0.8}, {"large": 1.0, "base": -0.8, "law": 0.8}),
            (1.0, {"large": 1.0, "base": -1.0, "law": 1.0, "fix": 1.0, "mend": 1.0}),
        ],
        ids=str,
    )
    def test_static_adds_correctors_and_differences_of_other_experts(
        self, alpha: float | Mapping[str, float], weights: dict[str, float]
    ) -> None:
        """fused = large + Σ α (expert − base) + Σ α corrector, and who has no weight does not run."""
        picks, members = self.generate(FusionParams(method="static", alpha=alpha))
        tokens = [1, 2]
        for pick in picks:
            fused = sum(weight * members[name].row(tokens).astype(np.float64) for name, weight in weights.items())
            assert pick.token == int(fused[:N_VOCAB].argmax())
            assert pick.logprob == pytest.approx(log_softmax(fused[:N_VOCAB])[0][pick.token], abs=1e-5)
            assert pick.trace
            assert pick.trace.alphas == {name: weights[name] for name in ("law", "fix", "mend") if name in weights}
            assert set(pick.trace.members) == {"large", "base", "law"} & set(weights), "a corrector alone says nothing"
            tokens.append(pick.token)
        assert {name for name, member in members.items() if member.calls} == set(weights)

    @pytest.mark.parametrize("n_draft", [None, 1, 3, 8])
    @pytest.mark.parametrize(
        ("alpha", "drafter"), [({"fix": 1.0}, None), ({"fix": 1.0, "law": 0.5}, "law"), (0.0, "base")], ids=str
    )
    def test_other_experts_and_the_text_draft_for_it_and_change_no_token(
        self, n_draft: int | None, alpha: float | Mapping[str, float], drafter: str | None
    ) -> None:
        fusion = FusionParams(method="static", alpha=alpha)
        plain, _ = self.generate(fusion, common=0.97)
        picks, members = self.generate(fusion, n_draft, common=0.97)
        assert [pick.token for pick in picks[:20]] == [pick.token for pick in plain]
        n_single = {name: sum(len(runs[0].tokens) == 1 for runs in member.calls) for name, member in members.items()}
        if drafter is None:
            assert len({len(member.calls) for member in members.values() if member.calls}) == 1, "none decodes alone"
        if drafter and n_draft and n_draft > 1:
            assert max(n_single, key=lambda name: n_single[name]) == drafter
        assert any(pick.from_draft for pick in picks) or not n_draft or not drafter

    def test_a_text_that_repeats_itself_is_drafted_for_a_corrector(self) -> None:
        class Repeating(FakeBackend):
            def row(self, text: Any) -> Any:
                return super().row(text) + np.float32(99) * (np.arange(self.n_vocab) == (text[-1] + 1) % 5)

        members = {name: Repeating(seed, N_VOCAB) for seed, name in enumerate(("large", "fix"))}
        decoder = Decoder(Ensemble(members, N_VOCAB, correctors=("fix",)), Fuser(N_VOCAB))
        fusion = FusionParams(method="static")
        prompts = dict.fromkeys(members, [0, 1, 2, 3, 4] * 3)
        request = GenerationRequest(decoder.ensemble.roles(fusion), prompts, fusion, GREEDY, n_draft=4)
        generation = Generation(request)
        decoder.begin(generation)
        picks = [pick for _ in range(4) for pick in decoder.step([generation])[0].picks]
        assert len(picks) > 4
        assert [pick.token for pick in picks] == [n % 5 for n in range(len(picks))]

    @pytest.mark.parametrize("names", [NAMES, ("large", "fix")])
    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"method": "dynamic"}, "method dynamic finds α from what experts change in a base; .*fix.* is added"),
            ({"method": "blend"}, "method blend takes a half of the large model; .*fix.* corrects the whole of it"),
            ({"method": "fix"}, "fix is a corrector: its logits mean nothing unless the large model's are added"),
            ({"method": "weighted", "weights": {"fix": 1.0}}, "fix is a corrector: .* a weight for large"),
            ({"method": "static", "plausibility": 0.1}, "plausibility goes by what an expert finds likely alone"),
        ],
        ids=str,
    )
    def test_what_makes_no_sense_is_said(self, names: tuple[str, ...], settings: dict[str, Any], reason: str) -> None:
        with pytest.raises(InvalidParameterError, match=reason):
            Roles.of(FusionParams(**settings), names, {"fix", "mend"} & set(names))

    @pytest.mark.parametrize("settings", [{"method": "base"}, {"method": "weighted", "weights": {"base": 1, "fix": 1}}])
    def test_a_base_that_is_not_there_is_not_run(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InvalidParameterError, match="there is no base to decode: fix is added to the large model"):
            Roles.of(FusionParams(**settings), ("large", "fix"), {"fix"})

    def test_other_experts_keep_their_methods(self) -> None:
        assert Roles.of(FusionParams(method="law"), self.NAMES, {"fix", "mend"}).members == ("law",)
        weights = {"large": 0.3, "law": 0.7}
        for plausibility in (0.0, 0.1):
            params = FusionParams(method="weighted", weights=weights, plausibility=plausibility)
            assert Roles.of(params, self.NAMES, {"fix", "mend"}).members == ("large", "law")


class TestFiles:
    def family(self, tiny: Path, folder: Path, experts: str, defaults: str = "") -> Path:
        for name in ("large", "base", "lora", "tuned"):
            if not (folder / f"{name}.gguf").exists():
                shutil.copy(tiny / f"{name}.gguf", folder)
        path = folder / "family.toml"
        head = 'name = "f"\n[large]\npath = "large.gguf"\n[base]\npath = "base.gguf"\n'
        path.write_text(f"{head}{experts}[defaults]\n{defaults}")
        return path

    def expert(self, name: str, lora: str = "", more: str = "") -> str:
        return f'[[experts]]\nname = "{name}"\nlora = "{lora or name}.gguf"\n{more}'

    def test_an_adapter_says_what_it_is(self, corrected: Path) -> None:
        files = check_files(corrected)
        assert files.correctors == {"fix"}
        assert list(files.models) == ["large", "fix"]
        assert files.methods == ("static", "weighted", "large")
        assert files.spec.defaults == {"method": "static", "temperature": 0.0}
        assert files.roles(files.spec.settings()) == Roles(("large", "fix"), ("fix",), (1.0, 1.0))

    def test_one_that_was_trained_through_the_fusion_is_an_expert(self, tiny: Path, tmp_path: Path) -> None:
        tiny_lora(tmp_path / "e.gguf", trained=("fusion", tiny / "base.gguf"))
        files = check_files(self.family(tiny, tmp_path, self.expert("e")))
        assert (files.correctors, list(files.models)) == (frozenset(), ["large", "base", "e"])
        assert files.spec.defaults == {}

    def test_another_large_model_is_refused_unless_forced(self, tiny: Path, corrected: Path, tmp_path: Path) -> None:
        tiny_model(tmp_path / "large.gguf", seed=8, n_embd=64, pad_vocab=4)
        shutil.copy(corrected / "fix.gguf", tmp_path)
        path = self.family(tiny, tmp_path, self.expert("fix"))
        with pytest.raises(FamilyError, match=r"fix.gguf: corrects another large model than large.gguf; .* as_corr"):
            check_files(path)
        path = self.family(tiny, tmp_path, self.expert("fix", more="as_corrector = true\n"))
        assert check_files(path).correctors == {"fix"}

    def test_an_adapter_that_says_nothing_can_be_taken_as_one(self, tiny: Path, tmp_path: Path) -> None:
        path = self.family(tiny, tmp_path, self.expert("lora", more="as_corrector = true\n"))
        assert check_files(path).correctors == {"lora"}
        spec = FamilySpec.from_files(tiny / "large.gguf", tiny / "base.gguf", {"t": tiny / "tuned.gguf"}, ["t"])
        assert check_files(spec).correctors == {"t"}, "a whole model may be one too"
        with pytest.raises(InvalidParameterError, match="as_corrector names 'x'; the experts are t"):
            FamilySpec.from_files(tiny / "large.gguf", tiny / "base.gguf", {"t": tiny / "tuned.gguf"}, ["x"])

    def test_wrong_word_for_it(self, tiny: Path, tmp_path: Path) -> None:
        path = self.family(tiny, tmp_path, self.expert("lora", more='as_corrector = "yes"\n'))
        with pytest.raises(FamilyError, match="as_corrector of expert 'lora' must be true or false, not 'yes'"):
            FamilySpec.load(path)

    def test_one_is_not_mixed_with_other_adapters(self, tiny: Path, corrected: Path, tmp_path: Path) -> None:
        shutil.copy(corrected / "fix.gguf", tmp_path)
        mixed = '[[experts]]\nname = "m"\nlora = ["fix.gguf", "lora.gguf"]\nscale = [0.5, 0.5]\n'
        with pytest.raises(FamilyError, match=r"expert 'm': fix.gguf is a corrector, lora.gguf is not"):
            check_files(self.family(tiny, tmp_path, mixed))
        shutil.copy(corrected / "fix.gguf", tmp_path / "other.gguf")
        both = mixed.replace("lora.gguf", "other.gguf")
        assert check_files(self.family(tiny, tmp_path, both)).correctors == {"m"}

    def test_beside_experts_there_is_a_base(self, tiny: Path, corrected: Path, tmp_path: Path) -> None:
        shutil.copy(corrected / "fix.gguf", tmp_path)
        files = check_files(self.family(tiny, tmp_path, self.expert("lora") + self.expert("fix")))
        assert list(files.models) == ["large", "base", "lora", "fix"]
        assert files.methods == ("static", "weighted", "large", "base", "lora")
        assert files.roles({**files.spec.settings(), "alpha": {"fix": 1.0}}).members == ("large", "fix")
        assert files.roles({**files.spec.settings(), "alpha": 0.5}).weights == (1.0, -0.5, 0.5, 0.5)

    def test_defaults_that_it_cannot_do(self, tiny: Path, corrected: Path, tmp_path: Path) -> None:
        shutil.copy(corrected / "fix.gguf", tmp_path)
        path = self.family(tiny, tmp_path, self.expert("fix"), 'method = "dynamic"\n')
        with pytest.raises(FamilyError, match="f: its \\[defaults\\] cannot be used: method dynamic finds"):
            check_files(path)

    def test_the_manifest_tells_it_from_an_expert(self, tiny: Path) -> None:
        files = {"lora": tiny / "lora.gguf", "tuned": tiny / "tuned.gguf"}
        specs = [FamilySpec.from_files(tiny / "large.gguf", tiny / "base.gguf", files, own) for own in ((), ("lora",))]
        before, now = (Manifest.of(check_files(spec), {}) for spec in specs)
        (difference,) = before.differences(now)
        assert difference.startswith("lora was lora.gguf")
        assert difference.endswith("a corrector)")

    def test_memory_is_planned_without_a_base_and_layers_go_by_its_name(self, corrected: Path) -> None:
        files, machine = check_files(corrected), Machine(2**33, gpus=(GPU("CUDA0", "", 2**33, 2**33),))
        plan = Planner(files, machine, n_gpu_layers={"large": 1, "base": 2}).plan(256)
        assert [(member.name, member.n_gpu_layers) for member in plan.members] == [("large", 1), ("fix", 2)]
        with pytest.raises(InvalidParameterError, match="n_gpu_layers names 'fix', a LoRA that has its layers from"):
            files.layers({"fix": 1})
        with pytest.raises(InvalidParameterError, match="n_gpu_layers names 'law'; the models are large, base"):
            files.layers({"law": 1})


class TestInMemory:
    def test_answers_are_those_of_the_sum(self, tiny: Path, corrected: Path) -> None:
        with FusedLlama.from_family(corrected, n_ctx=128, n_threads=1) as llm:
            ensemble, tokens = llm.driver.decoder.ensemble, llm.tokenize(PROMPT)
            assert list(ensemble.names) == ["large", "fix"]
            answer = list(llm.stream(PROMPT, max_tokens=12))
            n_prompt = len(tokens)
            for token in answer:
                ensemble.forget()
                rows = ensemble.decode({name: [Run(0, tokens, 1)] for name in ("large", "fix")})
                assert token.id == int(sum(rows[name][0, : llm.n_vocab] for name in rows).argmax())
                assert (token.alpha, token.expert) == (1.0, "fix")
                tokens.append(token.id)
            ensemble.forget()
            result = llm.create_completion(PROMPT, max_tokens=12)
            assert text(result) == "".join(token.text for token in answer)
            assert result["edge_dlf"]["method"] == "static"
            weighted = {"method": "weighted", "weights": {"large": 1.0, "fix": 1.0}}
            assert text(llm.create_completion(PROMPT, max_tokens=12, draft=3, **weighted)) == text(result)
            large = text(llm.create_completion(PROMPT, max_tokens=12, method="large"))
            assert text(llm.create_completion(PROMPT, max_tokens=12, alpha=0.0)) == large != text(result)
            for settings in ({"method": "dynamic"}, {"method": "fix"}, {"method": "base"}):
                with pytest.raises(InvalidParameterError):
                    llm.create_completion(PROMPT, **settings)
            (score,) = llm.score([(tokens[:n_prompt], tokens[n_prompt:])])
            assert score[1].is_greedy
            rows = llm.batch([{"id": "a", "prompt": PROMPT, "max_tokens": 12}])
            assert text(next(rows)["response"]["body"]) == text(result)
            assert list(ensemble.members) == ["large", "fix"]
        one = {"experts": {"fix": corrected / "fix.gguf"}, "n_ctx": 128, "n_threads": 1}
        with FusedLlama(tiny / "large.gguf", tiny / "base.gguf", **one) as llm:
            assert text(llm.create_completion(PROMPT, max_tokens=12, temperature=0.0)) == text(result)

    def test_beside_an_expert_the_base_is_loaded_when_it_is_needed(self, tiny: Path, corrected: Path) -> None:
        experts = {"fix": corrected / "fix.gguf", "tuned": tiny / "tuned.gguf"}
        spec = FamilySpec.from_files(tiny / "large.gguf", tiny / "base.gguf", experts)
        spec = FamilySpec(**{**vars(spec), "defaults": {"alpha": {"fix": 1.0}, "temperature": 0.0}})
        with FusedLlama.from_family(spec, n_ctx=128, n_threads=1) as llm:
            members = llm.driver.decoder.ensemble.members
            assert list(members) == ["large", "fix"]
            before = text(llm.create_completion(PROMPT, max_tokens=9))
            text(llm.create_completion(PROMPT, max_tokens=9, alpha={"fix": 1.0, "tuned": 0.5}))
            assert list(llm.driver.decoder.ensemble.members) == ["large", "base", "fix", "tuned"]
            assert text(llm.create_completion(PROMPT, max_tokens=9)) == before

    def test_what_a_server_offers(self, tiny: Path, corrected: Path) -> None:
        with FusedLlama.from_family(corrected, n_ctx=128, n_threads=1) as llm:
            assert models_of(llm, {}) == {"corrected": {}, "corrected:large": {"edge_dlf": {"method": "large"}}}
            given = {"method": "weighted", "weights": {"large": 1.0, "fix": 0.5}}
            assert list(models_of(llm, given)) == [f"corrected{way}" for way in ("", ":static", ":weighted", ":large")]

    def test_tune_gives_a_corrector_only_beside_the_large_model(self, corrected: Path, tmp_path: Path) -> None:
        with FusedLlama.from_family(corrected, n_ctx=256, n_threads=1) as llm:
            examples = drawn(llm, {"large": 1.0, "fix": 0.8}, 40)
            result = tune.tune_tasks(llm, {"": examples}, n_threads=1, folder=tmp_path)[""]
        assert [outcome.name for outcome in result.outcomes] == [
            "large alone", "static, α = 0.5", "static, α = 1", "weighted",
        ]  # fmt: skip
        weights = result.outcomes[-1].settings["weights"]
        assert weights == pytest.approx({"large": 1.0, "fix": 0.8}, abs=0.1)
        assert result.outcomes[-1].prior
        assert result.outcomes[-1].prior.name in ("large + fix", "large alone")
        assert "fix" in result.recommended.members


class TestTerminal:
    def test_new_makes_a_family_without_a_base(self, tiny: Path, corrected: Path) -> None:
        files = ["--large", tiny / "large.gguf", "--base", tiny / "base.gguf"]
        result = run("new", "mine", *files, "--expert", f"fix={corrected / 'fix.gguf'}")
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith("fix: added to the large model without the base\n")
        assert "as_corrector" not in Path(result.stdout.strip()).read_text()
        assert check_files("mine").correctors == {"fix"}
        answers = [
            run("generate", "--raw", *source, "--threads", 1, "--temperature", 0, "--max-tokens", 9, PROMPT)
            for source in (["-f", "mine"], [*files, "--expert", f"fix={corrected / 'fix.gguf'}"])
        ]
        assert answers[0].exit_code == answers[1].exit_code == 0, answers[0].output
        assert answers[0].stdout == answers[1].stdout
        forced = run("new", "forced", *files, "--expert", f"e={tiny / 'lora.gguf'}", "--as-corrector", "e")
        assert forced.exit_code == 0, forced.output
        assert check_files("forced").correctors == {"e"}

    @pytest.mark.parametrize(
        ("arguments", "code", "reason"),
        [
            (["--method", "dynamic"], 2, "method dynamic finds α"),
            (["--method", "fix"], 2, "fix is a corrector"),
            (["--method", "base"], 2, "there is no base to decode"),
            (["--weights", "large=1,base=1", "--method", "weighted"], 2, "there is no base to decode"),
            (["--as-corrector", "fix"], 2, "--as-corrector goes with --expert; a family.toml has as_corrector = true"),
        ],
        ids=str,
    )
    def test_what_makes_no_sense_is_one_line(
        self, corrected: Path, arguments: list[str], code: int, reason: str
    ) -> None:
        result = run("generate", "-f", corrected, *arguments, PROMPT)
        assert result.exit_code == code
        assert reason in result.stderr
        assert result.stderr.count("\n") == 1

    def test_compare_shows_what_can_be(self, corrected: Path) -> None:
        result = run("compare", "--raw", "-f", corrected, "--threads", 1, "--max-tokens", 5, "--json", PROMPT)
        assert list(json.loads(result.stdout)) == ["large", "static"]

    def test_show_and_doctor_count_no_base(self, tiny: Path, corrected: Path) -> None:
        told = json.loads(run("show", corrected, "--json").stdout)
        kinds = [member["kind"] for member in told["members"]]
        assert kinds == ["llama", "llama, for LoRAs to go over", "corrector, LoRA over llama"]
        checks = json.loads(run("doctor", corrected, "--json").stdout)
        names = [check["name"] for check in checks["checks"]]
        assert [name for name in names if name.startswith("decode")] == ["decode large", "decode fix"]

    def test_bench(self, corrected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench, "_ANSWERS_S", 0.1)
        monkeypatch.setattr(bench, "_READ_BYTES", 2**20)
        result = run("bench", corrected, "--threads", 1, "--json")
        assert result.exit_code == 0, result.output
        assert list(json.loads(result.stdout)["members"]) == ["large", "fix"]
