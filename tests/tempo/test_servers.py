"""`rollout` of a recipe -> options of servers; whatever cannot work is refused with its sentence. No server runs here."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tempo_em.console import PlainDisplay
from tempo_em.loading import load_recipe
from tempo_em.recipe import Recipe
from tempo_em.servers import check_servers, sglang_options
from tempo_em.train import Training
from tempo_engine.errors import UserError
from tempo_engine.model import Policy
from tempo_engine.samplers.sglang import SGLangOptions
from tempo_engine.sglang.fleet import Patience
from tempo_engine.sglang.server import LOOPBACK, ServerOptions, free_port

MakePolicy = Callable[..., Policy]
URL = "http://127.0.0.1:30000"
AHEAD = ("rollout.ahead=1", "mstep.old_logprob=sampler")


def recipe_with(*settings: str) -> Recipe:
    return load_recipe("tiny-sglang", list(settings)).recipe


@pytest.fixture
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy(intermediate_size=64)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """gpus(4): torch sees so many."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return see


# --- Recipe -> options -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_one_server_of_ours_on_this_cpu(policy: Policy, gpus: Callable[[int], None]) -> None:
    gpus(0)
    assert sglang_options(recipe_with(), policy) == SGLangOptions(
        server=ServerOptions(dtype="float32", max_running=128, context_length=8 + 8, deterministic=True),
        patience=Patience(start=600, health=60, generation=7200, update=600, restarts=3),
        sync="disk",
        verify="checksum",
    )


def test_every_setting_arrives(policy: Policy, gpus: Callable[[int], None]) -> None:
    gpus(8)
    recipe = recipe_with(
        "model.dtype=bfloat16",
        "rollout.max_running=32",
        "rollout.partial=true",
        *AHEAD,
        *(
            f"rollout.sglang.{setting}"
            for setting in (
                "replicas=2", "placement=disaggregated", "gpus=[4,5,6,7]", "tensor_parallel=2", "receipt=probe",
                "deterministic=false", "keep_cache=true", "max_total_tokens=5000", "memory_fraction=0.5", "threads=3",
                "port=31000", "restarts=7", "start_minutes=2", "health_seconds=5", "generation_minutes=3",
                "update_minutes=4", "sync_folder=weights", "arguments={chunked_prefill_size: 64}",
            )
        ),
    )  # fmt: skip
    assert sglang_options(recipe, policy) == SGLangOptions(
        server=ServerOptions(
            dtype="bfloat16",
            max_running=32,
            context_length=16,
            deterministic=False,
            tensor_parallel=2,
            max_total_tokens=5000,
            memory_fraction=0.5,
            gpus=(4, 5, 6, 7),
            threads=3,
            port=31000,
            arguments={"chunked_prefill_size": 64},
        ),
        patience=Patience(start=120, health=5, generation=180, update=240, restarts=7),
        replicas=2,
        sync="disk",
        sync_folder=recipe.rollout.sglang.sync_folder,
        verify="probe",
        keeps_cache=True,
        interrupts=True,
    )


@pytest.mark.parametrize(
    ("visible", "settings", "path"),
    [
        (0, (), "disk"),
        (1, (), "tensor"),
        (1, ("rollout.sglang.placement=disaggregated",), "distributed"),
        (0, (f"rollout.sglang.servers=[{URL}]",), "distributed"),
        (1, (f"rollout.sglang.servers=[{URL}]",), "distributed"),
        (0, AHEAD, "disk"),
        (2, ("rollout.sglang.data_parallel=2",), "disk"),
        (0, (f"rollout.sglang.servers=[{URL}]", "rollout.sglang.data_parallel=2"), "disk"),
        (0, ("rollout.sglang.sync=tensor",), "tensor"),
        (0, ("rollout.sglang.sync=distributed",), "distributed"),
    ],
)
def test_weights_take_the_path_that_fits(
    policy: Policy, gpus: Callable[[int], None], visible: int, settings: tuple[str, ...], path: str
) -> None:
    gpus(visible)
    assert sglang_options(recipe_with(*settings), policy).sync == path


def test_somebody_elses_servers_are_asked_with_the_key_of_the_environment(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = f"rollout.sglang.servers=[{URL}, 'http://localhost:30001']"
    monkeypatch.setenv("MY_KEY", "secret")
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    options = sglang_options(recipe_with(urls, "rollout.sglang.key_variable=MY_KEY"), policy)
    assert (options.urls, options.key) == ((URL, "http://localhost:30001"), "secret")
    assert sglang_options(recipe_with(urls), policy).key == "", "servers without a key"


def test_servers_of_ours_have_keys_of_their_own(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "of others")
    options = sglang_options(recipe_with(), policy)
    assert (options.urls, options.key) == ((), "")


def test_colocated_servers_share_the_trainers_gpus_and_give_memory_back(
    policy: Policy, gpus: Callable[[int], None]
) -> None:
    gpus(4)
    options = sglang_options(recipe_with("rollout.sglang.replicas=2", "rollout.sglang.tensor_parallel=2"), policy)
    assert (options.naps, options.server.saves_memory, options.server.gpus) == (True, True, (0, 1, 2, 3))


def test_colocated_servers_see_the_gpus_that_the_trainer_was_given(
    policy: Policy, gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's first GPU is the machine's seventh: a server told 0 would take somebody else's."""
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-8a1f")
    assert sglang_options(recipe_with(), policy).server.gpus == ("6", "GPU-8a1f")


@pytest.mark.parametrize(
    "settings", [("rollout.sglang.placement=disaggregated",), (f"rollout.sglang.servers=[{URL}]",)]
)
def test_servers_elsewhere_keep_their_memory(
    policy: Policy, gpus: Callable[[int], None], settings: tuple[str, ...]
) -> None:
    gpus(2)
    options = sglang_options(recipe_with(*settings), policy)
    assert not options.naps
    assert not options.server.saves_memory


# --- What cannot work --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_mixtures_of_experts_are_refused(policy: Policy, name: str) -> None:
    setattr(policy.model.config, name, 8)
    with pytest.raises(
        UserError, match=r"cannot sync weights of mixtures of experts yet \(llama\); use rollout.backend local"
    ):
        sglang_options(recipe_with(), policy)


def test_sizes_that_sglang_pads_on_a_cpu_are_refused_there_only(
    make_policy: MakePolicy, gpus: Callable[[int], None]
) -> None:
    padded = make_policy(intermediate_size=48)
    gpus(0)
    with pytest.raises(UserError, match="multiples of 32, the model's is 48; choose another model, or"):
        sglang_options(recipe_with(), padded)
    sglang_options(recipe_with(f"rollout.sglang.servers=[{URL}]"), padded)
    gpus(1)
    sglang_options(recipe_with(), padded)


def test_sampling_ahead_on_the_trainers_gpus_is_refused(policy: Policy, gpus: Callable[[int], None]) -> None:
    gpus(1)
    with pytest.raises(UserError, match=r"set rollout\.sglang\.placement to disaggregated, and gpus"):
        sglang_options(recipe_with(*AHEAD), policy)


def test_more_servers_than_gpus_are_refused(policy: Policy, gpus: Callable[[int], None]) -> None:
    gpus(3)
    settings = ("rollout.sglang.replicas=2", "rollout.sglang.tensor_parallel=2")
    with pytest.raises(
        UserError, match=r"^2 servers of 2 GPUs each need 4, there are 3; lower rollout\.sglang\.replicas"
    ):
        sglang_options(recipe_with(*settings), policy)
    gpus(0)
    sglang_options(recipe_with(*settings), policy)


LOCAL = "rollout.backend=local"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            (LOCAL, *AHEAD),
            "rollout.ahead wants servers that sample while this process trains; use rollout.backend sglang",
        ),
        (
            ("model.dtype=float64",),
            "SGLang has no float64; use model.dtype float32 or bfloat16, or rollout.backend local",
        ),
        (("rollout.top_p=0.9",), "only with top_k between 2 and 4096; set rollout.top_k beside top_p"),
        (("rollout.top_p=0.9", "rollout.top_k=1"), "only with top_k between 2 and 4096"),
        (("rollout.top_p=0.9", "rollout.top_k=4097"), "only with top_k between 2 and 4096"),
        (("rollout.top_k=4097",), "only with top_k between 2 and 4096"),
        (("rollout.partial=true",), "responses that are sampled ahead; set rollout.ahead to 1 or more"),
        (
            ("rollout.ahead=1",),
            "for which nothing corrects; set mstep.importance to token or sequence, or mstep.old_logprob to",
        ),
        ((*AHEAD, "em.order=lagged"), "rollout.ahead makes rollouts lag already; use em.order e_then_m"),
        ((*AHEAD, "rollout.sglang.sync=tensor"), "set rollout.sglang.sync to disk, it is tensor"),
        ((*AHEAD, "rollout.sglang.sync=distributed"), "set rollout.sglang.sync to disk, it is distributed"),
        (
            (f"rollout.sglang.servers=[{URL}]", "rollout.sglang.sync=tensor"),
            "sync tensor hands pickles to children of this process only; use distributed or disk for URLs",
        ),
        (
            ("rollout.sglang.sync=distributed", "rollout.sglang.data_parallel=2"),
            "sync distributed knows no data_parallel; use more replicas, or sync disk",
        ),
        (("rollout.sglang.servers=[]",), "servers is an empty list; give URLs, or auto"),
        (("rollout.sglang.arguments={api_key: mine}",), "arguments has api_key, which the engine sets itself"),
        (("rollout.sglang.arguments={model-path: /}",), "arguments has model-path, which the engine sets itself"),
        (("rollout.sglang.port=65535",), "rollout.sglang.port"),
        (("rollout.sglang.memory_fraction=1.5",), "rollout.sglang.memory_fraction"),
        (("rollout.sglang.replica=2",), "rollout.sglang.replica is not an option (did you mean replicas?)"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_way_out(settings: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        recipe_with(*settings)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        (LOCAL,),
        AHEAD,
        ("rollout.ahead=2", "rollout.partial=true", "mstep.importance=token"),
        (*AHEAD, "rollout.sglang.sync=disk"),
        (*AHEAD, "em.order=lagged", "method=frozen_critic"),
        ("rollout.top_p=0.9", "rollout.top_k=2"),
        ("rollout.top_p=0.9", "rollout.top_k=4096"),
        ("rollout.top_k=20",),
        (LOCAL, "rollout.top_p=0.9", "model.dtype=float64"),
        (f"rollout.sglang.servers=[{URL}]", "rollout.sglang.sync=disk", "rollout.sglang.data_parallel=2"),
    ],
)
def test_settings_that_go_together_are_taken(settings: tuple[str, ...]) -> None:
    recipe_with(*settings)


# --- Before a run ------------------------------------------------------------------------------------------------------------


def options_for(*urls: str) -> SGLangOptions:
    server = ServerOptions(dtype="float32", max_running=4, context_length=16)
    return SGLangOptions(server=server, patience=Patience(), urls=urls)


def test_servers_of_ours_are_started_on_one_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempo_engine.parallel.world_size", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    check_servers(options_for(), [])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="this run has several; start SGLang on each and list their URLs"):
        check_servers(options_for(), [])


def test_servers_of_ours_need_their_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        port = taken.getsockname()[1]
        options = options_for()
        with pytest.raises(UserError, match=f"port {port} is in use"):
            check_servers(replace(options, server=replace(options.server, port=port)), [])


def test_nothing_is_asked_before_every_url_is_allowed() -> None:
    absent = f"http://{LOOPBACK}:{free_port()}"
    with pytest.raises(UserError, match=r"add gpu7\.example\.org to rollout\.sglang\.allowed_hosts"):
        check_servers(options_for(absent, "http://gpu7.example.org:30000"), [])


def test_servers_that_do_not_answer_are_named() -> None:
    absent = f"http://{LOOPBACK}:{free_port()}"
    with pytest.raises(UserError, match=f"no server answers at {absent}: start it, or correct rollout.sglang.servers"):
        check_servers(options_for(absent), [])


def test_a_mistake_is_found_before_a_run_folder_exists(tmp_path: Path) -> None:
    resolved = load_recipe("tiny-sglang", [f"rollout.sglang.servers=[http://{LOOPBACK}:{free_port()}]"])
    with pytest.raises(UserError, match="no server answers"):
        Training(resolved, tmp_path / "run", PlainDisplay(), resume=False)
    assert not (tmp_path / "run").exists()
