"""Rollouts that a server draws: trained weights and seeds go there, trajectories with log-probabilities come back.

Whatever else would go unnoticed is refused: another model, weights that are not those of now (a stale policy), a sample
that does not start from the noise of its seed, log-probabilities that are not finite where the image is, and those that
are not ours, see `refuse_drift`. `b` samples, `t` steps.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Int64
from torch import Tensor

from adascope_fast.reference import Kind
from adascope_fast.remote_rollout import wire
from adascope_fast.remote_rollout.wire import Answer, Request, Served
from adascope_fast.rollout import Tables, Trajectory
from adascope_fast.schedules import Schedule
from adascope_fast.serving.client import Client, RefusedError, TryAgainError, Words, in_order
from adascope_fast.serving.wire import read_json

if TYPE_CHECKING:
    from adascope_fast.backbones.base import PipelineBackbone

MOST_CONFLICTS = 3
"""Times in a row that the server may have lost the weights of one rollout."""
TOLERANCE = 1e-4
"""Of the noise of a seed, whose last bits differ between processors."""
WORDS = Words(
    server="rollout server",
    section="rollout",
    command="rollout-server",
    correct="correct it there",
    smaller="raise --max-bytes there, and the limit of its proxy",
    sent="the token, the prompts and the trained weights",
)


class RemoteRollout:
    """Draws samples of a model on a server, with the weights that the model has here at each call.

    Args:
        url: the server's address, http://HOST:PORT.
        backbone: the model in training.
        model: digest of what it is made of, which the server's must be.
        token: that of the server; None: the environment variable `token_env` has it.
        timeout: seconds in which a request must be answered.
        patience: seconds for which a server that does not answer is waited for.
        parallel: requests at once.

    Raises:
        ValueError: there is no token, the server refuses it, is none, or has another model.
        OSError: it did not answer in time.
    """

    def __init__(
        self,
        url: str,
        backbone: "PipelineBackbone",
        *,
        model: str,
        token: str | None = None,
        token_env: str = "ADASCOPE_FAST_ROLLOUT_TOKEN",
        timeout: float = 600.0,
        patience: float = 600.0,
        parallel: int = 2,
    ) -> None:
        keys: dict[str, Any] = {"token": token, "token_env": token_env, "timeout": timeout, "patience": patience}
        self._client = Client(url, WORDS, **keys)
        self._backbone, self._model, self._parallel = backbone, model, parallel
        self._lock, self._held, self._asks_x0 = threading.Lock(), "", True
        self.served = self._client.patiently(self._described)

    def suit(self, *, kind: Kind, needs_x0: str, may_need_x0: bool, shares_start: bool) -> None:
        """Ask for what a training needs from now on; ValueError where the server cannot do it.

        Args:
            kind: of the log-probabilities.
            needs_x0: what needs the guesses of the final latents, in words; "" where nothing is known to.
            may_need_x0: whether something may look at them of which that is not known.
            shares_start: whether the samples of a prompt start from one latent.
        """
        served, self._asks_x0 = self.served, bool(needs_x0) or may_need_x0
        if kind not in served.kinds:
            self._refuse(f'has no log_prob of the kind "{kind}", only {", ".join(served.kinds) or "none"}')
        if needs_x0 and not served.has_x0:
            self._refuse(f"does not tell the guesses of the final latents (x0), and {needs_x0} needs them")
        if shares_start and not served.shares_start:
            self._refuse('gives each sample a start of its own, got algorithm.initial_noise = "group"')

    def __call__(
        self,
        prompts: Sequence[str],
        prompt_index: Int64[Tensor, " b"],
        schedule: Schedule,
        *,
        seeds: Sequence[int],
        start_seeds: Sequence[int] | None = None,
        guidance_scale: float,
        kind: Kind,
        batch: int,
        on_batch: Callable[[slice, Tensor], object] = lambda rows, latents: None,
    ) -> Trajectory:
        """A trajectory of each prompt, on the device of the schedule.

        Args:
            prompt_index: the row of each prompt among those that are encoded here.
            seeds: of each sample's noise, see `wire.noise_of`.
            start_seeds: of each, the seed whose noise has the latent that it starts from; None: its own.
            batch: samples of a request, which the server denoises at once.
            on_batch: called with (rows, final latents) of each request in order, as soon as those before have come.
        """
        tensors, metadata = self._backbone.adapter_file()
        body, weights = wire.write_weights(tensors, metadata)
        starts, device = seeds if start_seeds is None else start_seeds, schedule.coef.device
        pieces = [slice(first, min(first + batch, len(prompts))) for first in range(0, len(prompts), batch)]
        shape = (len(prompts), schedule.num_steps + 1, *self._backbone.latent_shape)
        tables = Tables.of(torch.full(shape, torch.nan, device=device), self._backbone.denoiser)

        def ask(rows: slice, stop: threading.Event) -> Answer:
            asked = list(prompts[rows]), list(seeds[rows]), list(starts[rows])
            request = Request(weights, *asked, guidance_scale, kind, self._asks_x0, schedule)
            conflicts = 0

            def answer() -> Answer:
                nonlocal conflicts
                try:
                    self._hand_over(body, weights)
                    return self._drawn(request)
                except RefusedError as error:
                    if error.status != 409 or (conflicts := conflicts + 1) > MOST_CONFLICTS:
                        raise
                    raise TryAgainError("holds other weights than those that were sent", is_busy=True) from None

            return self._client.patiently(answer, stop, look=self._described)

        def arrived(place: int, answer: Answer) -> None:
            rows = pieces[place]
            for name, value in vars(answer).items():
                if value is not None:
                    getattr(tables, name)[rows] = value.to(device)
            on_batch(rows, tables.latents[rows, -1])

        in_order(ask, pieces, self._parallel, self._client.is_over, arrived)
        told = (tables.x0_correlation, tables.sample_correlation) if self.served.has_correlations else (None, None)
        return Trajectory(tables.latents, tables.x0, tables.log_prob, schedule, list(prompts), prompt_index, *told)

    def _hand_over(self, body: bytes, weights: str) -> None:
        """Send the weights, unless the server has them."""
        with self._lock:
            if self._held == weights:
                return
            if len(body) > self.served.most_bytes:
                raise ValueError(
                    f"{self._client.told('takes requests')} of at most {self.served.most_bytes} bytes, got trained "
                    f"weights of {len(body)}; start it with --max-bytes {len(body) * 2}"
                )
            answer = self._client.exchange("POST", "/weights", body)
            found = self._client.read(lambda: read_json(answer)).get("weights")
            if found != weights:
                self._refuse(f"was sent the weights {weights[:12]} and says that it holds {found!s:.12}")
            self._held = weights

    def _drawn(self, request: Request) -> Answer:
        most = Answer.num_bytes(self.served, request)
        content = self._client.exchange("POST", "/rollout", request.write(), most_answer=most)
        answer, weights, model = self._client.read(lambda: Answer.read(content, self.served, request))
        if model != self._model:
            self._refuse_another(model)
        if weights != request.weights:
            self._refuse(
                f"has drawn with the weights {weights:.12}, and was asked for those of now, {request.weights:.12}"
            )
        self._refuse_start(request, answer)
        self._refuse_not_finite(request, answer)
        return answer

    def _refuse_start(self, request: Request, answer: Answer) -> None:
        """ValueError where a sample does not start from the noise of its seed, if it should."""
        if self.served.noise != "seeds":
            return
        shape = (1, *answer.latents.shape[2:])
        for number, seed in enumerate(request.start_seeds):
            start = wire.noise_of(seed, shape)[0]
            if not torch.allclose(answer.latents[number, 0], start, rtol=0.0, atol=TOLERANCE):
                self._refuse(f"has a sample of the seed {seed} that does not start from that seed's noise")

    def _refuse_not_finite(self, request: Request, answer: Answer) -> None:
        """ValueError where a finite image has a step that is not; an image that is not finite is the training's."""
        noisy = request.schedule.trainable.cpu()
        is_whole = answer.latents[:, -1].flatten(1).isfinite().all(1)
        parts = {"latents": answer.latents, "log_prob": answer.log_prob[:, noisy]}
        parts |= {} if answer.x0 is None else {"x0": answer.x0}
        for name, value in parts.items():
            if not bool(value[is_whole].isfinite().all()):
                self._refuse(f"has given {name} that are not finite, of an image that is")

    def training_ends(self) -> None:
        """Nobody is waited for any more."""
        self._client.is_over.set()

    def _described(self) -> Served:
        """What the server says of itself now; ValueError where it has another model."""
        answer = self._client.exchange("GET", "/rollout", None)
        found = self._client.read(lambda: Served.read(read_json(answer)))
        if found.model != self._model:
            self._refuse_another(found.model, found.name)
        if found.latent_shape != list(self._backbone.latent_shape):
            shapes = f"{found.latent_shape}, got {list(self._backbone.latent_shape)} here"
            self._refuse(f"has latents of shape {shapes}")
        with self._lock:
            self._held = found.weights
        self.served = found
        return found

    def _refuse_another(self, model: str, name: str = "a model") -> NoReturn:
        raise ValueError(
            f"{self._client.told('has another model than this training')}: {name} with the digest {model:.12}, not "
            f"{self._model:.12}; start it with the configuration of this run, and the same [model]"
        )

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f'{self._client.told(why)}; correct it there, or set rollout.name = "local"')


def refuse_drift(drift: float, max_drift: float) -> None:
    """ValueError where log-probabilities of a rollout are further from those of the first update than they may be.

    Both are of the same weights, so what is between them is how two engines round, or another policy, sampler or
    log-probability than ours.
    """
    if drift > max_drift:
        raise ValueError(
            f"log-probabilities of the rollout server must be within rollout.max_drift = {max_drift:g} of those of the "
            f"first update, got a difference of {drift:.3g}: it samples from another policy, or tells another log_prob "
            f"(docs/rollout_server.md); correct it there, or raise rollout.max_drift if that is how it rounds"
        )
