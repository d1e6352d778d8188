"""Asking a chat model many questions: any OpenAI-compatible endpoint, or a Hugging Face model in this process.

    model = OpenAIModel("gpt-4o-mini", cache="run/llm")  # OPENAI_BASE_URL, OPENAI_API_KEY from the environment
    answers = model.ask([Request.of("Name three colours.")])  # in the order of the requests
    answers[0].text or answers[0].reason

An answer that did not come is missing: its text is None and its reason says why. It is never an empty string
or a number that might be averaged. Answers are kept on disk as they came, one file each, so that a run that
was killed asks nothing twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import inspect
import json
import logging
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import files
from .answers import Answer, Request, Usage, quoted
from .endpoint_keys import TRANSPORT, Address, Secrets, checked_key, keys_in

if TYPE_CHECKING:
    import openai
    import torch

logger = logging.getLogger(__name__)

# Seconds until a host that does not answer counts as one where nothing listens.
_CONNECT = 10.0
# What endpoints call an account that has nothing left, which may come as 429 and is no matter of waiting.
_NO_CREDIT = frozenset(
    ("insufficient_quota", "insufficient_balance", "insufficient_credits", "billing_hard_limit_reached",
     "billing_not_active")
)  # fmt: skip


class _CachedModel(ABC):
    """What both kinds of model share: equal requests asked once, answers kept on disk, a bar, and the counts.

    The cache is keyed by model, messages and parameters, not by the address of the endpoint, which changes
    when a server is started again on another port.
    """

    def __init__(self, name: str, origin: str, *, cache: str | Path | None, progress: bool | None) -> None:
        self.name, self.origin = name, origin
        self.usage = Usage()
        self._cache = None if cache is None else Path(cache)
        self._secrets = Secrets()
        self._progress = sys.stderr.isatty() if progress is None else progress

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each request, in their order; a failed one is missing, with its reason.

        Raises:
            ValueError: the endpoint refuses every request (wrong key, no such model, no credit left).
            ConnectionError: nothing answers at the endpoint.
            TimeoutError: it takes longer than it is given, again and again.
        """
        wanted = {self._key(request): request for request in requests}
        answers: dict[str, Answer] = {}
        with tqdm(total=len(wanted), unit="answer", desc=f"asking {self.name}",
                  disable=not self._progress, leave=False) as bar:  # fmt: skip

            def take(key: str, answer: Answer, raw: Mapping[str, Any] | None = None) -> None:
                if self._cache is not None and raw is not None and answer.text is not None:
                    sent = self._secrets.hide_in(self._sent(wanted[key]))
                    record = {"origin": self.origin, "request": sent, "response": raw}
                    with files.keeping("answers", self._cache):
                        files.write_json(self._path(key), record)
                answers[key] = answer
                self.usage = self.usage.plus(answer)
                bar.update()

            for key in wanted:
                if (kept := self._kept(key)) is not None:
                    take(key, kept)
            bar.unpause()
            missing = {key: request for key, request in wanted.items() if key not in answers}
            if missing:
                self._answer(missing, take)
        return [answers[self._key(request)] for request in requests]

    @abstractmethod
    def _answer(self, requests: Mapping[str, Request], take: Callable[..., None]) -> None:
        """Call ``take(key, answer, raw)`` for each request as its answer comes."""

    @abstractmethod
    def _sent(self, request: Request) -> dict[str, Any]:
        """Everything that shapes the answer, as JSON."""

    @abstractmethod
    def _read(self, raw: Any) -> Answer:
        """The answer in a raw response."""

    def _key(self, request: Request) -> str:
        return hashlib.sha256(json.dumps(self._sent(request), sort_keys=True).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        assert self._cache is not None
        return self._cache / key[:2] / f"{key}.json"

    def _kept(self, key: str) -> Answer | None:
        if self._cache is None or not self._path(key).is_file():
            return None
        try:
            answer = self._read(files.read_json(self._path(key))["response"])
        except (ValueError, KeyError, TypeError):
            answer = Answer(None, "damaged")
        if answer.text is None:
            logger.warning("%s is damaged; it is asked again", self._path(key))
            return None
        return dataclasses.replace(answer, cached=True)


class OpenAIModel(_CachedModel):
    """A model behind an OpenAI-compatible ``/chat/completions`` endpoint, through the ``openai`` package.

    Lost connections, 408, 409, 429 and 5xx are tried again by that package: after 0.5 s, doubling to 8 s, with
    jitter, or after what ``Retry-After`` says if that is at most two minutes. A question that was given up after
    ``timeout`` is not: many servers go on with what nobody waits for any more, and the same question once more
    would only make them slower. After as many time-outs in a row as requests are under way at once nothing
    more is asked.

    Args:
        model: its name at the endpoint; by default ``SNMF_LLM_MODEL``.
        base_url: such as ``http://localhost:8000/v1``; by default ``OPENAI_BASE_URL``, else OpenAI's own. It may
            have a user and password, and a query, which is sent with every request.
        api_key: by default ``OPENAI_API_KEY``; an endpoint of your own may need none.
            Keys, this one and those in ``base_url`` and ``parameters``, are in no message, answer or file.
        cache: folder of the answers; None keeps none.
        concurrency: the most requests under way at once.
        max_retries: of one request.
        timeout: seconds for one question, its retries included. Small models on busy processors need minutes.
        parameters: fields of the request beside model and messages, also those that OpenAI does not know
            (``top_k``, ``chat_template_kwargs``). They replace the defaults ``{"temperature": 0, "max_tokens": …}``
            (``max_completion_tokens`` at OpenAI's own endpoint); a field that is None is left out, as for models
            that take no temperature. ``extra_headers`` and ``extra_query`` are sent, and kept nowhere.
        progress: show a bar on stderr; by default when it is a terminal.

    Raises:
        ValueError: no model or no key is given, a key that no header can carry, a base URL that is none, or a number
            out of range.
        ModuleNotFoundError: the ``openai`` package is not installed.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        cache: str | Path | None = None,
        concurrency: int = 8,
        max_retries: int = 6,
        timeout: float = 600.0,
        parameters: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> None:
        name = model or _setting("SNMF_LLM_MODEL")
        if not name:
            raise ValueError("model: wanted the model's name at the endpoint; give it, or set SNMF_LLM_MODEL")
        for argument, value, least in (("concurrency", concurrency, 1), ("max_retries", max_retries, 0)):
            if value < least:
                raise ValueError(f"{argument}: wanted at least {least}, got {value}")
        if not timeout > 0:
            raise ValueError(f"timeout: wanted seconds above 0, got {timeout}")
        _import_openai()
        self._address = Address.of(base_url or _setting("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        super().__init__(name, self._address.shown, cache=cache, progress=progress)
        self.concurrency, self.max_retries, self.timeout = concurrency, max_retries, timeout
        self._timed_out = 0  # in a row
        own = "api.openai.com" not in self.origin
        given = ("api_key", api_key) if api_key else ("OPENAI_API_KEY", _setting("OPENAI_API_KEY"))
        key = checked_key(*given)
        if not key and not own:
            raise ValueError("api_key: OPENAI_API_KEY is not set; set it, or name an endpoint by base_url")
        self._api_key = key or "none"
        self._fields = dict(parameters or {})
        self._secrets = Secrets([key, *self._address.secrets, *keys_in(self._fields)])
        self._transport = {name: self._fields.pop(name) for name in TRANSPORT if name in self._fields}
        # OpenAI's newer models refuse the old name, and many other servers do not know the new one.
        self._length = "max_tokens" if own else "max_completion_tokens"

    @property
    def parameters(self) -> dict[str, Any]:
        """The fields of the request that were given, for the record: without keys."""
        shown: dict[str, Any] = self._secrets.hide_in(self._fields)
        return shown

    def _sent(self, request: Request) -> dict[str, Any]:
        fields = {"temperature": 0, self._length: request.max_tokens, **self._fields}
        known = {name: value for name, value in fields.items() if value is not None}
        return {"model": self.name, "messages": request.chat, **known}

    def _read(self, raw: Any) -> Answer:
        try:
            choice, usage = raw["choices"][0], raw.get("usage") or {}
            text, ended = choice["message"]["content"], choice.get("finish_reason")
            counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            return Answer(None, f"the endpoint's answer is no chat completion: {quoted(raw)}")
        if not isinstance(text, str) or not text.strip():
            return Answer(None, f"the answer is empty (finish_reason {ended})", *counts)
        # Half of a pair of surrogates is JSON, but nothing that can be printed or stored as UTF-8.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return Answer(text, None, *counts, cut_off=ended == "length")

    def _answer(self, requests: Mapping[str, Request], take: Callable[..., None]) -> None:
        # In a thread of its own: works where a loop is running already, as in a notebook, and an interrupt
        # cancels what is under way at once.
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal() as portal:
            portal.call(self._answer_all, requests, take)

    async def _answer_all(self, requests: Mapping[str, Request], take: Callable[..., None]) -> None:
        openai = _import_openai()
        waiting = iter(requests.items())
        # The package would send again what has timed out, so the limit is not the package's.
        limits = openai.Timeout(None, connect=_CONNECT)
        async with openai.AsyncOpenAI(
            base_url=self._address.url,
            default_query=self._address.query,
            api_key=self._api_key,
            max_retries=self.max_retries,
            timeout=limits,
            http_client=openai.DefaultAsyncHttpxClient(
                timeout=limits, event_hooks={"response": [_retry_no_empty_account]}
            ),
        ) as client:
            workers = [
                asyncio.create_task(self._work(client, waiting, take, len(requests)))
                for _ in range(min(self.concurrency, len(requests)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(
        self,
        client: openai.AsyncOpenAI,
        waiting: Iterator[tuple[str, Request]],
        take: Callable[..., None],
        total: int,
    ) -> None:
        """Answer one waiting request after another."""
        openai = _import_openai()
        for key, request in waiting:
            fields = _known_fields(self._sent(request)) | self._transport
            # What is raised has no cause where the cause's text may quote a key.
            try:
                response: Any = await asyncio.wait_for(client.chat.completions.create(**fields), self.timeout)
            except asyncio.TimeoutError as error:
                self._timed_out += 1
                reason = f"time-out: no answer within {self.timeout:g} s"
                if self._timed_out >= self.concurrency:
                    raise TimeoutError(
                        f"{self.origin}: {reason}, {self._timed_out} times in a row; the server is too slow "
                        "for what it is asked, or stuck. Give it longer by timeout (--timeout), or ask less at once "
                        "by concurrency (--concurrency)"
                    ) from error
                take(key, Answer(None, reason))
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ValueError(
                    f"{self.origin} refuses {self.name!r}: {self._quoted(error)}; check model, base URL and key"
                ) from None
            except openai.APIConnectionError as error:
                cause = f" ({self._quoted(error.__cause__)})" if error.__cause__ else ""
                # By name: the classes have moved from httpx to httpx2. Nothing listens, and nothing has: rather
                # say so than collect as many failures as there are requests.
                refused = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
                if refused and self.usage.sent == self.usage.failed:
                    raise ConnectionError(
                        f"{self.origin}: no connection{cause} after {self.max_retries + 1} tries; "
                        "is the server running, and the base URL right?"
                    ) from None
                take(key, Answer(None, f"no connection{cause}"))
            except openai.OpenAIError as error:
                if _is_out_of_credit(getattr(error, "status_code", None), getattr(error, "body", None)):
                    raise ValueError(
                        f"{self.origin} refuses {self.name!r}: {self._quoted(error)}; the account has no credit "
                        "left: add some, or ask another endpoint by base_url (--base-url)"
                    ) from None
                reason = f"{type(error).__name__}: {self._quoted(error)}"
                if name := _refused_field(error, self._sent(request)):
                    reason += f"; leave {name} out by parameters={{{name!r}: None}} (--parameter {name}=null)"
                take(key, Answer(None, reason))
            except ValueError as error:
                take(key, Answer(None, f"the endpoint's answer is not JSON in UTF-8: {self._quoted(error)}"))
            else:
                self._timed_out = 0
                raw = response.model_dump(mode="json") if hasattr(response, "model_dump") else response
                raw = self._secrets.hide_in(raw)
                answer = self._read(raw)
                if answer.reason is not None:
                    answer = dataclasses.replace(answer, reason=self._secrets.hide(answer.reason))
                take(key, answer, raw)

    def _quoted(self, error: BaseException) -> str:
        """What an error says, without keys; cut after they are gone, so that no part of one is left."""
        return quoted(self._secrets.hide(str(error)) or type(error).__name__)


class LocalModel(_CachedModel):
    """A Hugging Face chat model in this process, decoded greedily.

    Args:
        network: a causal LM of transformers. It is put into eval mode.
        tokenizer: its tokenizer; its chat template is used where it has one, else the bare question.
        name: for the record.
        cache: folder of the answers; None keeps none.
        batch_size: requests decoded together.
        max_tokens: the most tokens of every answer, in place of what each request allows; for models that think
            before they answer.
        progress: show a bar on stderr; by default when it is a terminal.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        name: str = "local",
        cache: str | Path | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        progress: bool | None = None,
    ) -> None:
        from .models import fingerprint

        for argument, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{argument}: wanted at least 1, got {value}")
        super().__init__(name, "this process", cache=cache, progress=progress)
        self.network, self.tokenizer, self.batch_size = network.eval(), tokenizer, batch_size
        self.max_tokens = max_tokens
        self._weights = fingerprint(network)

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        cache: str | Path | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        progress: bool | None = None,
    ) -> LocalModel:
        """Load one by what :func:`snmf_interp.load_model` takes: a bundled name, file, folder or Hub id."""
        import torch

        from .models import load_network

        network, tokenizer, _ = load_network(name_or_path, device=device, dtype=dtype or torch.float32)
        return cls(
            network,
            tokenizer,
            name=name_or_path,
            cache=cache,
            batch_size=batch_size,
            max_tokens=max_tokens,
            progress=progress,
        )

    def _sent(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.name,
            "weights": self._weights,
            "messages": request.chat,
            "max_tokens": self._length(request),
        }

    def _length(self, request: Request) -> int:
        """The most tokens of its answer."""
        return self.max_tokens or request.max_tokens

    def _read(self, raw: Any) -> Answer:
        text = str(raw["text"])
        counts = int(raw["prompt_tokens"]), int(raw["completion_tokens"])
        if not text.strip():
            return Answer(None, "the answer is empty", *counts)
        return Answer(text, None, *counts, cut_off=bool(raw.get("cut_off")))

    def _answer(self, requests: Mapping[str, Request], take: Callable[..., None]) -> None:
        positions = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        prompts: dict[str, list[int]] = {}
        for key, request in requests.items():
            ids, most = self._encode(request), self._length(request)
            if positions and len(ids) + most > positions:
                reason = f"{len(ids)} tokens and {most} to answer: the model takes {positions}"
                take(key, Answer(None, reason))
            else:
                prompts[key] = ids
        # Prompts of like length share a batch, the longest first: memory runs out early if at all.
        order = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
        for first in range(0, len(order), self.batch_size):
            keys = order[first : first + self.batch_size]
            lengths = [self._length(requests[key]) for key in keys]
            made = self._generate([prompts[key] for key in keys], max(lengths))
            for key, length, new in zip(keys, lengths, made, strict=True):
                ids = new[:length]
                raw = {
                    "text": self.tokenizer.decode(ids, skip_special_tokens=True),
                    "prompt_tokens": len(prompts[key]),
                    "completion_tokens": len(ids),
                    "cut_off": len(ids) == length,
                }
                take(key, self._read(raw), raw)

    def _encode(self, request: Request) -> list[int]:
        from .models import check_ids

        ids: Any
        if getattr(self.tokenizer, "chat_template", None):
            ids = self.tokenizer.apply_chat_template(
                request.chat, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer("\n\n".join(content for _, content in request.messages) + "\n\n")[
                "input_ids"
            ]
        return check_ids(self.network, self.tokenizer, list(ids))

    def _generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """The new ids of each prompt, up to its end."""
        import torch

        from . import hooks
        from .models import padding_id

        pad = padding_id(self.network, self.tokenizer)
        ends = self.network.generation_config.eos_token_id
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        if self.tokenizer.eos_token_id is not None:
            stops.add(int(self.tokenizer.eos_token_id))
        ids, mask = hooks.pad(prompts, side="left", pad_id=pad)
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            made = self.network.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_tokens,
                do_sample=False,
                # Of a sampling default that the checkpoint may bring.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=sorted(stops) or None,
            )
        return [
            row[: next((i for i, token in enumerate(row) if token in stops), len(row))]
            for row in made[:, ids.shape[1] :].tolist()
        ]


def _known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A request's fields as the ``openai`` package takes them: those that it does not know in ``extra_body``."""
    from openai.resources.chat import AsyncCompletions

    known = inspect.signature(AsyncCompletions.create).parameters
    extra = {name: value for name, value in fields.items() if name not in known}
    own = {name: value for name, value in fields.items() if name in known}
    return own | {"extra_body": extra | dict(own.get("extra_body") or {})} if extra else own


def _setting(name: str) -> str:
    """A variable of the environment, without the line end of a file that it may have been read from."""
    return os.environ.get(name, "").strip()


async def _retry_no_empty_account(response: Any) -> None:
    """Tell the ``openai`` package, which tries every 429 again, where that is in vain."""
    if response.status_code == 429:
        try:
            body = json.loads(await response.aread())
        except ValueError:
            return
        if _is_out_of_credit(response.status_code, body):
            response.headers["x-should-retry"] = "false"


def _is_out_of_credit(status: int | None, body: Any) -> bool:
    """Whether an error says that the account has nothing left; ``body`` with or without its ``error`` around it."""
    error = body.get("error", body) if isinstance(body, Mapping) else None
    codes = (error.get("code"), error.get("type")) if isinstance(error, Mapping) else ()
    return status == 402 or any(isinstance(code, str) and code in _NO_CREDIT for code in codes)


def _refused_field(error: Any, sent: Mapping[str, Any]) -> str | None:
    """The field of the request that the endpoint does not take, beside model and messages, or None."""
    if getattr(error, "status_code", None) not in (400, 422):
        return None
    fields = [name for name in sent if name not in ("model", "messages")]
    body = getattr(error, "body", None)
    if isinstance(body, Mapping) and body.get("param") in fields:
        return str(body["param"])
    return next((name for name in fields if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(error))), None)


def _import_openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "asking an endpoint needs the openai package: pip install 'snmf-kernels[llm]'"
        ) from error
    return openai
