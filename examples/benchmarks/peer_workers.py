"""What peers.py runs in the environment of each peer: one method, on the run that it saved.

Every method is a generator. After what it does for any outputs it yields the bytes that it keeps beside model and data;
after what it does for the losses of the test examples it yields how much the deletion of each training example changes
them, ``(n, outputs)``. It stops after the first outputs where all would take too long.

    python examples/benchmarks/peer_workers.py METHOD DIRECTORY
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from studies import IGNORED, Examples, example_losses, make_module
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

MEMORY = 8 * 2**30  # bytes of address space that a method may take
RIDGE = 1e-2  # added to the eigenvalues of Hessians, which are indefinite
ONE_SWEEP_EACH = 20  # outputs, for methods that run backwards through training for each


class Run:
    """The run that peers.py saved.

    ``train`` and ``test`` are inputs and targets, ``rows`` those of every batch, ``rates`` the learning rates of the
    steps, ``initial`` and ``trained`` parameters, ``checkpoints`` those before the steps ``checkpoint_steps``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with safe_open(directory / "run.safetensors", framework="pt") as file:
            tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        self.name, self.optimizer = about["name"], about["optimizer"]
        self.train: Examples = (tensors["train.inputs"], tensors["train.targets"])
        self.test: Examples = (tensors["test.inputs"], tensors["test.targets"])
        self.rows, self.rates = tensors["rows"], tensors["rates"].tolist()
        self.checkpoint_steps = tensors["checkpoint_steps"].tolist()
        self.module = make_module(self.name, self.optimizer, len(self.rows)).double()
        names = [name for name, _ in self.module.named_parameters()]
        self.initial, self.trained, *self.checkpoints = (
            {name: tensors[f"{point}.{name}"] for name in names}
            for point in ("initial", "trained", *range(len(self.checkpoint_steps)))
        )
        self.module.load_state_dict(self.trained)
        self.n, self.num_parameters = len(self.train[0]), sum(p.numel() for p in self.trained.values())

    def to_float32(self) -> None:
        """Convert everything, for libraries that know no other."""
        self.module.float()
        self.trained = {name: p.float() for name, p in self.trained.items()}
        self.train, self.test = (
            (inputs.float() if inputs.is_floating_point() else inputs, targets)
            for inputs, targets in (self.train, self.test)
        )

    def losses(self, parameters: dict[str, Tensor], data: Examples) -> Tensor:
        """Return the loss of every example; of a single one, too, that has no dimension of examples."""
        inputs, targets = (t.reshape(-1, *like.shape[1:]) for t, like in zip(data, self.train, strict=True))
        return example_losses(functional_call(self.module, parameters, (inputs,)), targets)

    def loss_of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss; of a single example, too, that has no dimension of examples."""
        if targets.ndim < self.train[1].ndim:
            logits, targets = logits[None], targets[None]
        return example_losses(logits, targets).mean()

    def loader(self, examples: Examples, batch: int | None = None) -> DataLoader:
        """Return examples in their order, all in one batch unless said."""
        return DataLoader(TensorDataset(*examples), batch_size=batch or len(examples[0]))


Method = Callable[[Run], Iterator[Any]]


def autograd(run: Run) -> Iterator[Any]:
    """Reverse mode through the whole training, written out without a library."""
    deleted = torch.zeros(run.n, dtype=torch.float64, requires_grad=True)
    parameters = {name: p.clone().requires_grad_() for name, p in run.initial.items()}
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step, (rows, rate) in enumerate(zip(run.rows, run.rates, strict=True), start=1):
        losses = run.losses(parameters, (run.train[0][rows], run.train[1][rows]))
        objective = ((1 - deleted[rows]) * losses).mean()
        gradients = torch.autograd.grad(objective, list(parameters.values()), create_graph=True)
        for (name, p), g in zip(list(parameters.items()), gradients, strict=True):
            if run.optimizer == "sgd":
                first[name] = 0.9 * first[name] + g
                update = first[name]
            else:
                first[name] = 0.85 * first[name] + 0.15 * g
                second[name] = 0.99 * second[name] + 0.01 * g**2
                update = first[name] / (1 - 0.85**step) / (second[name] / (1 - 0.99**step) + 1e-3).sqrt()
            parameters[name] = p - rate * update
    yield 0
    outputs = run.losses(parameters, run.test)
    (changes,) = torch.autograd.grad(outputs, deleted, torch.eye(len(outputs)).double(), is_grads_batched=True)
    yield changes.T


def bergson(run: Run) -> Iterator[Any]:
    """MAGIC: the trainer replays its checkpoints backwards, once for each output."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = run.module
            self.net.load_state_dict(run.initial)

        def forward(self, input_ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return (weights * example_losses(self.net(input_ids), targets)).mean()

    class Stream:
        def __init__(self) -> None:
            self.weights = torch.nn.Parameter(torch.ones(run.n, dtype=torch.float64))
            self.requires_grad, self.device = True, torch.device("cpu")

        def __len__(self) -> int:
            return len(run.rows)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            rows = run.rows[i]
            return {"input_ids": run.train[0][rows], "targets": run.train[1][rows], "weights": self.weights[rows]}

    torch.set_default_dtype(torch.float64)  # that of torchopt's bias correction
    rates = torch.tensor(run.rates)
    if run.optimizer == "sgd":
        optimizer = torchopt.sgd(run.rates[0], momentum=0.9)
    else:
        optimizer = torchopt.adam(lambda step: rates[int(step)], betas=(0.85, 0.99), eps=0.0, eps_root=1e-3)
    trainer, state = Trainer.initialize(Model(), optimizer)
    stream, checkpoints = Stream(), str(run.directory / "bergson")
    state = trainer.train(state, stream, save_dir=checkpoints)
    yield bytes_of(Path(checkpoints))
    # a copy, since every sweep overwrites the state
    trained = {name: p.detach().clone().requires_grad_() for name, p in state.params.items()}
    columns = []
    for i in range(min(ONE_SWEEP_EACH, len(run.test[0]))):
        parameters = {name.removeprefix("net."): p for name, p in trained.items()}
        loss = run.losses(parameters, (run.test[0][i], run.test[1][i])).sum()
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        moments = [torch.zeros_like(t) for t in state.differentiable_tensors()[len(gradients) :]]
        start = BackwardState(gradients, moments, torch.zeros_like(stream.weights))
        columns.append(-trainer.backward(checkpoints, stream, start, state, cleanup=False).weight_grads.detach())
    yield torch.stack(columns, dim=1)


def pydvl_exact(run: Run) -> Iterator[Any]:
    """Influence functions with the Hessian made and solved."""
    from pydvl.influence.torch import DirectInfluence

    model = DirectInfluence(run.module, run.loss_of_logits, regularization=RIDGE).fit(run.loader(run.train))
    yield run.num_parameters**2 * 8
    yield model.influences(*run.test, *run.train).T / run.n


def pydvl_nystroem(run: Run) -> Iterator[Any]:
    """Influence functions with a Hessian of rank 200."""
    from pydvl.influence.torch import NystroemSketchInfluence

    rank = 200
    model = NystroemSketchInfluence(run.module, run.loss_of_logits, regularization=RIDGE, rank=rank)
    model = model.fit(run.loader(run.train))
    yield run.num_parameters * rank * 8
    yield model.influences(*run.test, *run.train).T / run.n


def dattri_task(run: Run, function: Callable[[Tensor], Tensor], checkpoints: Any) -> Any:
    """Attribute a function of an example's loss."""
    from dattri.task import AttributionTask

    def value(parameters: dict[str, Tensor], data: Examples) -> Tensor:
        return function(run.losses(parameters, data)).mean()

    return AttributionTask(loss_func=value, model=run.module, checkpoints=checkpoints)


def dattri_cg(run: Run) -> Iterator[Any]:
    """Influence functions by conjugate gradients; the Hessian is that of one batch, so all examples are in one."""
    from dattri.algorithm.influence_function import IFAttributorCG

    task = dattri_task(run, lambda losses: losses, run.trained)
    attributor = IFAttributorCG(task, max_iter=30, regularization=RIDGE)
    attributor.cache(run.loader(run.train))
    yield 0
    yield attributor.attribute(run.loader(run.train), run.loader(run.test, 5)) / run.n


def dattri_tracin(run: Run) -> Iterator[Any]:
    """TracIn: what gradient descent without momentum would have done, at every checkpoint for all steps around it."""
    from dattri.algorithm.tracin import TracInAttributor

    task = dattri_task(run, lambda losses: losses, run.checkpoints)
    visits = run.rows.numel() / run.n / len(run.checkpoints)
    weights = torch.tensor([run.rates[step] * visits / run.rows.shape[1] for step in run.checkpoint_steps])
    attributor = TracInAttributor(task, weight_list=weights, normalized_grad=False)
    attributor.projector_kwargs = None
    yield len(run.checkpoints) * run.num_parameters * 8
    yield attributor.attribute(run.loader(run.train), run.loader(run.test))


def margin(losses: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of ``p = exp(-loss)``, which is what TRAK attributes."""
    return -losses - torch.log(-torch.expm1(-losses))


def loss_from_margin(run: Run, changes: Tensor) -> Tensor:
    """Return small changes of the test losses from those of their margins, ``(n, outputs)``."""
    p = torch.exp(-run.losses(run.trained, run.test))
    return -(1 - p) * changes


def dattri_trak(run: Run) -> Iterator[Any]:
    """TRAK with one model and 1,024 projected numbers."""
    from dattri.algorithm.trak import TRAKAttributor

    def probability(parameters: dict[str, Tensor], data: Examples) -> Tensor:
        return torch.exp(-run.losses(parameters, data))

    size = {"proj_dim": 1024, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}
    attributor = TRAKAttributor(
        dattri_task(run, margin, run.trained), probability, projector_kwargs=size, regularization=1e-3
    )
    attributor.cache(run.loader(run.train))
    yield run.n * 1024 * 8
    yield loss_from_margin(run, -attributor.attribute(run.loader(run.test)))


def traker(run: Run) -> Iterator[Any]:
    """TRAK with one model and 128 projected numbers; float32, and scores without a unit."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class Margin(AbstractModelOutput):
        def __init__(self) -> None:
            """Nothing to keep."""

        def get_output(self, model: Any, weights: Any, buffers: Any, *data: Tensor) -> Tensor:
            return margin(run.losses(weights, data)).sum()

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, data: Any) -> Tensor:
            return (1 - torch.exp(-run.losses(weights, data))).detach().unsqueeze(-1)

    run.to_float32()
    scorer = TRAKer(
        run.module,
        Margin(),
        run.n,
        save_dir=str(run.directory / "traker"),
        device="cpu",
        proj_dim=128,
        use_half_precision=False,
    )
    state = run.module.state_dict()
    scorer.load_checkpoint(state, model_id=0)
    scorer.featurize(batch=run.train, num_samples=run.n)
    scorer.finalize_features()
    yield run.n * 128 * 4
    scorer.start_scoring_checkpoint("test", state, 0, len(run.test[0]))
    scorer.score(batch=run.test, num_samples=len(run.test[0]))
    scores = torch.from_numpy(np.array(scorer.finalize_scores("test")))
    yield loss_from_margin(run, -scores)


def kronfluence(run: Run) -> Iterator[Any]:
    """EK-FAC of the linear layers, float32; damping is a tenth of the mean eigenvalue."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Losses(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            inputs, targets = batch
            logits = model(inputs)
            if not sample:
                return example_losses(logits, targets).sum()
            drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
            drawn = torch.where(targets == IGNORED, IGNORED, drawn)
            losses = F.cross_entropy(logits.movedim(-1, 1), drawn, reduction="none", ignore_index=IGNORED)
            # the Gauss-Newton matrix of a mean over L positions is 1 / L of the sum's, so gradients weigh 1 / sqrt(L)
            return losses.sum() if losses.ndim == 1 else (losses.sum(1) / (targets != IGNORED).sum(1).sqrt()).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return example_losses(model(batch[0]), batch[1]).sum()

        def get_attention_mask(self, batch: Any) -> Tensor | None:
            return (batch[1] != IGNORED).long() if batch[1].ndim > 1 else None

    run.to_float32()
    train, test = TensorDataset(*run.train), TensorDataset(*run.test)
    task, out = Losses(), run.directory / "kronfluence"
    analyzer = Analyzer(
        "peers", prepare_model(run.module, task), task, cpu=True, output_dir=str(out), disable_tqdm=True
    )
    analyzer.fit_all_factors("ekfac", train, per_device_batch_size=run.n, factor_args=FactorArguments("ekfac"))
    yield bytes_of(out)
    arguments = ScoreArguments(damping_factor=None)
    sizes = {"per_device_query_batch_size": len(test), "per_device_train_batch_size": run.n}
    analyzer.compute_pairwise_scores("scores", "ekfac", test, train, score_args=arguments, **sizes)
    yield analyzer.load_pairwise_scores("scores")["all_modules"].T.double() / run.n


def bytes_of(directory: Path) -> int:
    """Return the bytes of all files below."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


METHODS: dict[str, Method] = {
    method.__name__: method
    for method in (
        autograd, bergson, pydvl_exact, pydvl_nystroem, dattri_cg, dattri_tracin, dattri_trak, traker, kronfluence,
    )
}  # fmt: skip


def main() -> None:
    """Run a method and save its changes, with its seconds and bytes."""
    method, directory = sys.argv[1], Path(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = Run(directory)
    with sdpa_kernel(SDPBackend.MATH):  # other kernels have no second derivatives
        steps = METHODS[method](run)
        times = [time.process_time()]
        stored = next(steps)
        times.append(time.process_time())
        changes = next(steps)
        times.append(time.process_time())
    about = {"precomputation": times[1] - times[0], "outputs": times[2] - times[1], "bytes": stored}
    metadata = {key: str(value) for key, value in about.items()}
    save_file({"changes": changes.detach().double().contiguous()}, directory / f"{method}.safetensors", metadata)


if __name__ == "__main__":
    main()
