"""The real openai client against a server on 127.0.0.1, and a tiny random model in this process."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("openai")

from snmf_interp.answers import Answer, Request, Usage, ask_json, find_object  # after the check
from snmf_interp.llm import LocalModel, OpenAIModel

from .conftest import make_network, make_tokenizer
from .endpoint import Endpoint, Reply, completion, serve


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "SNMF_LLM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    # Loopback must not go through a proxy that the machine may have.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def echo(body: dict[str, Any], _earlier: int) -> Reply:
    return completion(body["messages"][-1]["content"].upper())


def model(endpoint: Endpoint, **options: Any) -> OpenAIModel:
    return OpenAIModel("fake", **{"base_url": endpoint.url, "progress": False, "max_retries": 2, **options})


def questions(*texts: str) -> list[Request]:
    return [Request.of(text, max_tokens=50) for text in texts]


def test_answers_in_order_with_usage() -> None:
    with serve(echo) as endpoint:
        asker = model(endpoint, concurrency=3)
        answers = asker.ask(questions("a", "b", "c", "b"))
        assert [answer.text for answer in answers] == ["A", "B", "C", "B"]
        assert sorted(endpoint.questions()) == ["a", "b", "c"]  # equal questions are asked once
        assert endpoint.received[0] | {"messages": 0} == {
            "model": "fake",
            "messages": 0,
            "temperature": 0,
            "max_tokens": 50,
        }
        assert asker.usage == Usage(sent=3, prompt_tokens=21, completion_tokens=9)
        assert asker.usage.cost(2.0, 10.0) == pytest.approx((21 * 2 + 9 * 10) / 1e6)
        assert asker.ask([]) == []


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(echo) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        monkeypatch.setenv("SNMF_LLM_MODEL", "from-the-environment")
        asker = OpenAIModel(parameters={"temperature": None, "top_p": 0.5})
        assert asker.ask(questions("a"))[0].text == "A"
        assert endpoint.keys == ["Bearer secret"]
        assert endpoint.received[0]["model"] == "from-the-environment"
        assert "temperature" not in endpoint.received[0]
        assert endpoint.received[0]["top_p"] == 0.5


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match="model: wanted the model's name at the endpoint; give it, or set SNMF"
    ):
        OpenAIModel()
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        OpenAIModel("gpt")
    with pytest.raises(ValueError, match="concurrency: wanted at least 1, got 0"):
        OpenAIModel("gpt", api_key="x", concurrency=0)
    with pytest.raises(ValueError, match="timeout: wanted seconds above 0"):
        OpenAIModel("gpt", api_key="x", timeout=0)
    with pytest.raises(ValueError, match="either a text or the reason"):
        Answer(None)


def test_busy_and_broken_servers_are_asked_again() -> None:
    """429 with Retry-After, 500, and a connection that closes half-way: each question has its answer in the end."""
    waits = {"busy": (429, {"Retry-After": "1"}, {}), "broken": (500, {}, {}), "closed": (200, {}, None)}

    def answer(body: dict[str, Any], earlier: int) -> Reply:
        question = body["messages"][-1]["content"]
        return waits[question] if earlier == 0 else echo(body, earlier)

    with serve(answer) as endpoint:
        asker = model(endpoint)
        assert [a.text for a in asker.ask(questions("busy", "broken", "closed"))] == [
            "BUSY",
            "BROKEN",
            "CLOSED",
        ]
        assert sorted(endpoint.questions()) == ["broken", "broken", "busy", "busy", "closed", "closed"]
        busy = [t for t, q in zip(endpoint.times, endpoint.questions(), strict=True) if q == "busy"]
        # Its own first wait is half a second at most: this one was the server's.
        assert busy[1] - busy[0] >= 0.95
        assert asker.usage == Usage(sent=3, prompt_tokens=21, completion_tokens=9)


BAD: dict[str, tuple[Reply, str]] = {
    "not JSON": ((200, {}, b'{"choices": [{'), "not JSON"),
    "not UTF-8": ((200, {}, b'{"choices": [{"x": "\xff\xfe"}]}'), "not JSON in UTF-8"),
    "a web page": ((200, {"Content-Type": "text/html"}, b"<html>log in</html>"), "no chat completion: <html>"),
    "no choices": (completion("x", choices=[]), "no chat completion"),
    "null choices": (completion("x", choices=None), "no chat completion"),
    "no message": (completion("x", choices=[{"index": 0}]), "no chat completion"),
    "empty": (completion("  "), "empty"),
    "no content": (completion(None), r"empty \(finish_reason stop\)"),
    "too long": ((400, {}, {"error": {"message": "maximum context length"}}), "BadRequestError: .*maximum context"),
    "always broken": ((503, {}, {"error": "down"}), "InternalServerError"),
    "always closed": ((200, {}, None), "no connection"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_failed_answer_is_missing_with_its_reason(case: str, tmp_path: Path) -> None:
    reply, reason = BAD[case]

    def answer(body: dict[str, Any], earlier: int) -> Reply:
        return reply if body["messages"][-1]["content"] == case else echo(body, earlier)

    with serve(answer) as endpoint:
        asker = model(endpoint, cache=tmp_path, max_retries=1)
        good, bad = asker.ask(questions("good", case))
        assert good.text == "GOOD"
        assert bad.text is None
        assert bad.reason is not None
        assert re.search(reason, bad.reason)
        assert (asker.usage.sent, asker.usage.failed) == (2, 1)
        # A failure is not kept: the next run asks for it, and for it alone.
        sent = len(endpoint.received)
        asker.ask(questions("good", case))
        assert set(endpoint.questions()[sent:]) == {case}


def test_what_timed_out_is_not_asked_again() -> None:
    """The server would work on both: on what nobody waits for, and on the same once more."""
    release = threading.Event()

    def answer(body: dict[str, Any], earlier: int) -> Reply:
        if body["messages"][-1]["content"] == "slow":
            release.wait(20)
        return echo(body, earlier)

    with serve(answer) as endpoint:
        asker = model(endpoint, timeout=2)
        slow, fast = asker.ask(questions("slow", "fast"))
        assert slow.reason == "time-out: no answer within 2 s"
        assert fast.text == "FAST"
        assert endpoint.questions().count("slow") == 1
        assert (asker.usage.sent, asker.usage.failed) == (2, 1)
        release.set()


def test_a_server_that_is_too_slow_is_asked_no_more() -> None:
    """However many questions wait, few are abandoned, and the error says what to do."""
    release = threading.Event()

    def answer(body: dict[str, Any], earlier: int) -> Reply:
        if body["messages"][-1]["content"] != "fast":
            release.wait(20)
        return echo(body, earlier)

    with serve(answer) as endpoint:
        asker = model(endpoint, timeout=1, concurrency=2)
        try:
            # Alone it is missing; in a row with the next, which an answer interrupts, it is too much.
            (first,) = asker.ask(questions("first"))
            assert first.text is None
            assert asker.ask(questions("fast"))[0].text == "FAST"
            with pytest.raises(
                TimeoutError, match=r"no answer within 1 s, 2 times in a row; .*\(--timeout\)"
            ):
                asker.ask(questions(*"abcdefgh"))
            assert len(endpoint.received) <= 2 + 3
        finally:
            release.set()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_request_can_mend_ends_the_run(status: int) -> None:
    with serve(lambda body, earlier: (status, {}, {"error": {"message": "no such thing"}})) as endpoint:
        with pytest.raises(ValueError, match=r"refuses 'fake'.*no such thing.*check model, base URL and key"):
            model(endpoint, concurrency=2).ask(questions(*"abcdefgh"))
        assert len(endpoint.received) <= 2


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (402, {"message": "Insufficient Balance"}),
        (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}),
        (429, {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": None}),
    ],
)
def test_an_account_without_credit_ends_the_run(status: int, error: dict[str, Any]) -> None:
    with serve(lambda body, earlier: (status, {}, {"error": error})) as endpoint:
        with pytest.raises(ValueError, match=r"refuses 'fake'.*no credit left"):
            model(endpoint, concurrency=2, max_retries=6).ask(questions(*"abcdefgh"))
        # None is asked twice: waiting does not help.
        assert len(endpoint.received) <= 2
        assert len(set(endpoint.questions())) == len(endpoint.received)


@pytest.mark.parametrize(
    ("error", "field"),
    [
        ({"message": "'temperature' does not support 0 with this model.", "param": "temperature"}, "temperature"),
        ({"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}, "max_tokens"),
        ({"message": "top_k: extra fields not permitted", "param": None}, "top_k"),
        ({"message": "the prompt's temperature_unit is bad"}, None),
    ],
)  # fmt: skip
def test_a_field_that_the_endpoint_refuses_is_named_with_the_remedy(
    error: dict[str, Any], field: str | None
) -> None:
    def answer(body: dict[str, Any], earlier: int) -> Reply:
        return (400, {}, {"error": error}) if field is None or field in body else echo(body, earlier)

    with serve(answer) as endpoint:
        (refused,) = model(endpoint, parameters={"top_k": 5}).ask(questions("a"))
        assert refused.reason is not None
        if field is None:
            assert "--parameter" not in refused.reason
            return
        assert f"(--parameter {field}=null)" in refused.reason
        (answered,) = model(endpoint, parameters={"top_k": 5, field: None}).ask(questions("a"))
        assert answered.text == "A"


class TestKeys:
    KEY = "sk-test-4f/8+a=1b2c3d"

    def everything(self, asker: OpenAIModel, folder: Path) -> str:
        """What a user may come to see: answers, the error, the cache, and the record of labels."""
        try:
            said = str(asker.ask(questions("a", "b")))
        except (ValueError, ConnectionError) as error:
            said = "".join(traceback.format_exception(error))
        kept = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.json"))
        return said + kept + json.dumps(asker.parameters) + asker.origin

    def test_space_around_settings_is_no_part_of_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with serve(echo) as endpoint:
            monkeypatch.setenv("OPENAI_BASE_URL", f"{endpoint.url}\r\n")
            monkeypatch.setenv("OPENAI_API_KEY", f" {self.KEY}\r\n")
            monkeypatch.setenv("SNMF_LLM_MODEL", "fake\r")
            assert OpenAIModel().ask(questions("a"))[0].text == "A"
            OpenAIModel(api_key=f"{self.KEY}\n").ask(questions("a"))
            assert endpoint.keys == [f"Bearer {self.KEY}"] * 2
            assert endpoint.received[0]["model"] == "fake"

    @pytest.mark.parametrize("wrong", ["\u2026", "\r", "\u200b", "\x00", "ü"])
    def test_a_key_that_no_header_can_carry_is_refused(
        self, wrong: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = f"sk-first{wrong}second"
        with pytest.raises(
            ValueError, match=r"api_key: wanted printable ASCII.*as character 9 of 15"
        ) as caught:
            OpenAIModel("m", api_key=key)
        if wrong != "\x00":  # which no environment can have
            monkeypatch.setenv("OPENAI_API_KEY", key)
            with pytest.raises(ValueError, match="OPENAI_API_KEY: wanted printable ASCII"):
                OpenAIModel("m")
        for part in ("first", "second", wrong):
            assert part not in str(caught.value)

    @pytest.mark.parametrize("place", ["key", "user", "query", "header", "body"])
    @pytest.mark.parametrize("status", [200, 400, 401, 402, 500, "page", "address"])
    def test_no_key_is_shown_or_kept(self, place: str, status: int | str, tmp_path: Path) -> None:
        """The worst endpoint: it repeats whatever it was sent, in every spelling."""

        def answer(body: dict[str, Any], earlier: int) -> Reply:
            said = f"you sent {self.KEY} or {quote(self.KEY, safe='')} or {self.KEY.encode()!r}, {body}"
            if status == "page":
                return 200, {"Content-Type": "text/html"}, f"<html>{said}".encode()
            if status == 200:
                return completion(said, system_fingerprint=self.KEY)
            return int(status), {}, {"error": {"message": "x" * 150 + said, "param": self.KEY}}

        with serve(answer) as endpoint:
            url = "http://" if status == "address" else endpoint.url
            options: dict[str, Any] = {"key": {"api_key": self.KEY}}.get(place, {})
            if place == "user":
                options["base_url"] = url.replace("http://", f"http://me:{quote(self.KEY, safe='')}@")
            elif place == "query":
                options["base_url"] = f"{url}?api_key={quote(self.KEY, safe='')}"
            elif place == "header":
                options["parameters"] = {"extra_headers": {"api-key": f"Token {self.KEY}"}}
            elif place == "body":
                options["parameters"] = {"metadata": {"api_key": self.KEY}}
            if status == "address" and place in ("user", "query"):
                with pytest.raises(ValueError, match="base_url: wanted an address") as refused:
                    model(endpoint, **options)
                shown = str(refused.value)
            else:
                shown = self.everything(model(endpoint, cache=tmp_path, max_retries=0, **options), tmp_path)
                assert endpoint.received
        assert self.KEY not in shown
        assert quote(self.KEY, safe="") not in shown
        assert "4f/8" not in shown

    def test_user_and_query_of_an_address_are_sent(self) -> None:
        with serve(echo) as endpoint:
            with_user = endpoint.url.replace("http://", "http://me:p%40ss@")
            assert model(endpoint, base_url=with_user).ask(questions("a"))[0].text == "A"
            assert endpoint.keys == [f"Basic {base64.b64encode(b'me:p@ss').decode()}"]
            assert (
                model(endpoint, base_url=f"{endpoint.url}?version=2").origin == f"{endpoint.url}?version=***"
            )
            model(endpoint, base_url=f"{endpoint.url}?version=2").ask(questions("a"))
            assert endpoint.paths[-1] == "/v1/chat/completions?version=2"

    def test_a_key_that_is_a_word_is_left_in_answers(self) -> None:
        with serve(lambda *_: completion("the EMPTY set")) as endpoint:
            asker = model(endpoint, api_key="EMPTY")
            assert asker.ask(questions("a"))[0].text == "the EMPTY set"
        with serve(lambda *_: (400, {}, {"error": {"message": "no EMPTY, but EMPTYING"}})) as endpoint:
            (refused,) = model(endpoint, api_key="EMPTY").ask(questions("a"))
            assert "no ***, but EMPTYING" in str(refused.reason)


def test_nothing_listens() -> None:
    with serve(echo) as endpoint:
        asker = model(endpoint, max_retries=0)
    with pytest.raises(ConnectionError, match=r"no connection.*is the server running"):
        asker.ask(questions("a", "b"))


def test_concurrency_is_bounded() -> None:
    full = threading.Barrier(3)

    def answer(body: dict[str, Any], earlier: int) -> Reply:
        # Three at a time or never: a client that sends them one by one breaks the barrier.
        full.wait(10)
        time.sleep(0.05)
        return echo(body, earlier)

    with serve(answer) as endpoint:
        answers = model(endpoint, concurrency=3).ask(questions(*"abcdefghi"))
        assert [answer.text for answer in answers] == list("ABCDEFGHI")
        assert endpoint.most == 3


def test_cache_and_resume(tmp_path: Path) -> None:
    """A run that dies half-way keeps what was answered; the next one asks for the rest alone."""
    dead = False

    def answer(body: dict[str, Any], earlier: int) -> Reply:
        if dead and body["messages"][-1]["content"] > "c":
            return 401, {}, {"error": {"message": "expired"}}
        return echo(body, earlier)

    with serve(answer) as endpoint:
        dead = True
        with pytest.raises(ValueError, match="expired"):
            model(endpoint, cache=tmp_path, concurrency=1).ask(questions(*"abcdef"))
        dead = False
        first = endpoint.questions()
        assert first == ["a", "b", "c", "d"]
        asker = model(endpoint, cache=tmp_path)
        assert [a.text for a in asker.ask(questions(*"abcdef"))] == list("ABCDEF")
        assert sorted(endpoint.questions()[4:]) == ["d", "e", "f"]
        assert asker.usage == Usage(sent=3, cached=3, prompt_tokens=21, completion_tokens=9)
        again = model(endpoint, cache=tmp_path).ask(questions(*"abcdef"))
        assert len(endpoint.received) == 7
        assert all(answer.cached for answer in again)
        # Another model, another parameter, another length is another request.
        for changed in (
            model(endpoint, cache=tmp_path, parameters={"temperature": 1}),
            OpenAIModel("other", base_url=endpoint.url, cache=tmp_path),
        ):
            changed.ask(questions("a"))
        model(endpoint, cache=tmp_path).ask([Request.of("a", max_tokens=51)])
        assert len(endpoint.received) == 10
    record = json.loads(next(p for p in tmp_path.rglob("*.json") if '"A"' in p.read_text()).read_text())
    assert record["origin"] == endpoint.url
    assert record["request"]["messages"] == [{"role": "user", "content": "a"}]
    assert record["response"]["choices"][0]["message"]["content"] == "A"
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_cache_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(echo) as endpoint:
        for content in ("{", "{}", '{"response": {"choices": []}}', '{"response": null}'):
            model(endpoint, cache=tmp_path).ask(questions("a"))
            (path,) = tmp_path.rglob("*.json")
            path.write_text(content)
            sent = len(endpoint.received)
            assert model(endpoint, cache=tmp_path).ask(questions("a"))[0].text == "A"
            assert len(endpoint.received) == sent + 1
            assert "damaged" in caplog.text
            caplog.clear()


def test_interrupt_cancels_what_is_under_way(tmp_path: Path) -> None:
    """Ctrl-C does not wait for the server; what was answered before stays."""
    release = threading.Event()

    def answer(body: dict[str, Any], earlier: int) -> Reply:
        if body["messages"][-1]["content"] == "slow" and not release.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)
            release.wait(20)
        return echo(body, earlier)

    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    # Another signal than Ctrl-C's, which a shell may have set to be ignored.
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with serve(answer) as endpoint:
            asker = model(endpoint, cache=tmp_path, concurrency=1)
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                asker.ask(questions("fast", "slow"))
            assert time.monotonic() - started < 10
            release.set()
            assert [a.text for a in asker.ask(questions("fast", "slow"))] == ["FAST", "SLOW"]
            assert endpoint.questions() == ["fast", "slow", "slow"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_half_a_surrogate_pair_is_an_answer(tmp_path: Path) -> None:
    reply = (200, {}, json.dumps(completion("x")[2]).replace('"x"}', r'"so \ud83d \u00e4"}').encode())
    with serve(lambda *_: reply) as endpoint:
        asker = model(endpoint, cache=tmp_path)
        assert [a.text for a in asker.ask(questions("one"))] == ["so ? ä"]
        assert [a.text for a in asker.ask(questions("one"))] == ["so ? ä"]
        assert len(endpoint.received) == 1


def test_fields_that_openai_does_not_know_are_sent() -> None:
    parameters = {
        "top_k": 20,
        "chat_template_kwargs": {"enable_thinking": False},
        "extra_body": {"min_p": 0.1},
    }
    with serve(echo) as endpoint:
        assert model(endpoint, parameters=parameters).ask(questions("one"))[0].text == "ONE"
    assert endpoint.received[0]["top_k"] == 20
    assert endpoint.received[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert endpoint.received[0]["min_p"] == 0.1
    assert endpoint.received[0]["temperature"] == 0


def test_an_answer_that_was_cut_off_among_several_is_missing(tmp_path: Path) -> None:
    """A judge that thinks aloud has weighed scores, and given none."""
    weighing = 'I could say {"score": 0} or {"score": 2}. The text'
    cut = completion(weighing)[2]
    cut["choices"][0]["finish_reason"] = "length"
    with serve(lambda *_: (200, {}, cut)) as endpoint:
        asker = model(endpoint, cache=tmp_path)
        for _ in range(2):  # the second time from the cache
            (parsed,) = ask_json(asker, questions("one"), dict, repairs=0)
            assert parsed.value is None
            assert "cut off among several" in str(parsed.reason)
    with serve(lambda *_: completion(weighing)) as endpoint:
        (parsed,) = ask_json(model(endpoint), questions("one"), dict, repairs=0)
        assert parsed.value == {"score": 2}


class TestJSON:
    def test_thoughts_are_no_answer(self) -> None:
        for text in (
            '<think>{"a": 0} or {"a": 1}',
            '{"a": 0} it seems</think>',
            '<think>x</think>{"b"<think>{"a": 0}',
        ):
            with pytest.raises(ValueError, match="wanted a JSON object"):
                find_object(text)
        assert find_object('{"a": 0} it seems</think> {"a": 1}') == {"a": 1}
        assert find_object('{"a": 1} since', cut_off=True) == {"a": 1}
        assert find_object('{"a": 1} since {"a": 1}', cut_off=True) == {"a": 1}

    def test_found_among_words(self) -> None:
        assert find_object('Sure!\n```json\n{"a": {"b": 1}}\n```') == {"a": {"b": 1}}
        assert find_object('<think>{"a": 0}</think> like {"a": …}: {"a": 2}. Done }') == {"a": 2}
        for text in ("", "none", "{", '{"a": }', "[1]", "{" * 5000):
            with pytest.raises(ValueError, match="wanted a JSON object"):
                find_object(text)

    def test_a_model_may_mend_its_answer_once(self) -> None:
        replies = {"good": ["{}"], "mends": ["what?", '{"a": 1}'], "never": ["no", "no", "no"]}

        class Fake:
            name = "fake"
            rounds: list[list[Request]] = []  # noqa: RUF012 - one test, one list

            def ask(self, requests: list[Request]) -> list[Answer]:
                self.rounds.append(list(requests))
                return [
                    Answer(None, "time-out")
                    if r.messages[0][1] == "fails"
                    else Answer(replies[r.messages[0][1]][len(r.messages) // 2])
                    for r in requests
                ]

        fake = Fake()
        good, mended, never, failed = ask_json(fake, questions("good", "mends", "never", "fails"), dict)
        assert (good.value, good.reason, good.raw) == ({}, None, "{}")
        assert (mended.value, mended.reason, mended.raw) == ({"a": 1}, None, '{"a": 1}')
        assert never.value is None
        assert never.reason == "unusable answer: wanted a JSON object, got no"
        assert never.raw == "no"
        assert (failed.value, failed.reason, failed.raw) == (None, "time-out", None)
        assert [len(requests) for requests in fake.rounds] == [4, 2]
        assert "wanted a JSON object, got what?" in fake.rounds[1][0].messages[-1][1]


class TestLocal:
    @pytest.fixture
    def network(self) -> Any:
        return make_network("llama")

    def test_garbage_is_no_json(self, network: Any, tmp_path: Path) -> None:
        asker = LocalModel(network, make_tokenizer(), cache=tmp_path, progress=False)
        requests = [Request.of(text, max_tokens=8) for text in ("the cat", "a dog sat on the mat", "Monday")]
        parsed = ask_json(asker, requests, dict)
        assert [p.value for p in parsed] == [None] * 3
        assert all(p.reason for p in parsed)

    def test_batches_agree_with_single_questions_and_are_kept(self, network: Any, tmp_path: Path) -> None:
        texts = ("the cat", "a dog sat on the mat", "Monday", "one two three rain")
        requests = [Request.of(text, max_tokens=5 + i) for i, text in enumerate(texts)]
        together = LocalModel(network, make_tokenizer(), cache=tmp_path, progress=False)
        answers = together.ask(requests)
        alone = LocalModel(network, make_tokenizer(), batch_size=1, progress=False)
        assert [a.text for a in answers] == [a.text for a in alone.ask(requests)]
        assert together.usage.sent == 4
        again = LocalModel(network, make_tokenizer(), cache=tmp_path, progress=False)
        assert [a.text for a in again.ask(requests)] == [a.text for a in answers]
        assert again.usage.sent == again.usage.failed
        # Other weights are another model, whatever they are called.
        other = LocalModel(make_network("mistral"), make_tokenizer(), cache=tmp_path, progress=False)
        other.ask(requests)
        assert other.usage.cached == 0

    def test_answers_are_cut_off_where_their_tokens_end(self, network: Any, tmp_path: Path) -> None:
        request = Request.of("the cat", max_tokens=4)
        asker = LocalModel(network, make_tokenizer(), cache=tmp_path, progress=False)
        for _ in range(2):
            (answer,) = asker.ask([request])
            assert answer.cut_off == (answer.completion_tokens == 4)
        (longer,) = LocalModel(network, make_tokenizer(), max_tokens=9, progress=False).ask([request])
        assert 4 < longer.completion_tokens <= 9
        with pytest.raises(ValueError, match="max_tokens: wanted at least 1"):
            LocalModel(network, make_tokenizer(), max_tokens=0)

    def test_what_does_not_fit_is_missing(self, network: Any) -> None:
        asker = LocalModel(network, make_tokenizer(), progress=False)
        long, short = asker.ask([Request.of("cat " * 60, max_tokens=8), Request.of("cat", max_tokens=8)])
        assert long.text is None
        assert long.reason == "61 tokens and 8 to answer: the model takes 64"
        assert short.reason != long.reason

    def test_chat_template(self, network: Any) -> None:
        tokenizer = make_tokenizer(add_bos=False)
        tokenizer.chat_template = (
            "{% for m in messages %}the {{ m.content }} . {% endfor %}"
            "{% if add_generation_prompt %}a{% endif %}"
        )
        ids = LocalModel(network, tokenizer, progress=False)._encode(Request.of("red cat"))
        assert tokenizer.decode(ids) == "the red cat . a"
