"""forge_common.chat: a real server of an assembled model, through HTTP and in Chromium."""

import contextlib
import dataclasses
import http.client
import json
import re
import signal
import time
from types import SimpleNamespace

import browser
import launch
import psutil
import pytest
import small_artifacts
from reading_html import CHROMIUM, Page

from forge_common import chat, generate
from forge_common.generation.server import Server
from forge_common.reporting.chat_page import chat_page

TEMPLATE = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}a:{% endif %}"
EVIL = "</script><img src=x onerror=alert(1)>"
SHORT = {"max_new_tokens": 30, "seed": 5}
ENDLESS = {"prompt": "The", "temperature": 0, "max_new_tokens": 10**6}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of an assembled model with a chat template and a context of 8,192."""
    folder = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        config = dataclasses.replace(small_artifacts.CONFIG, max_position_embeddings=8192)
        patch.setattr(small_artifacts, "CONFIG", config)
        small_artifacts.build(folder)
    (folder / "trunk" / "chat_template.jinja").write_text(TEMPLATE)
    small_artifacts.assemble.main(small_artifacts.assembling(folder))
    model = folder / "new" / "assembled"
    out = folder / "chat.out"
    process = launch.Background("-m", "forge_common.chat", "--model", model, "--port", 0, out=out)
    deadline = time.monotonic() + launch.PATIENCE
    while not (found := re.search(r"http://127\.0\.0\.1:(\d+) ", out.read_text() if out.exists() else "")):
        assert process.poll() is None and time.monotonic() < deadline, out.read_text()
        time.sleep(0.01)
    yield SimpleNamespace(model=model, port=int(found[1]), process=process, out=out, folder=folder)
    if process.poll() is None:
        process.terminate()
        process.wait(launch.PATIENCE)


@contextlib.contextmanager
def asked(server, content, **headers):
    """The response to POST /generate."""
    own = f"127.0.0.1:{server.port}"
    headers = {"Host": own, "Origin": f"http://{own}", "Content-Type": "application/json"} | headers
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=launch.PATIENCE)
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    connection.request("POST", "/generate", body, {name: value for name, value in headers.items() if value is not None})
    with contextlib.closing(connection), connection.getresponse() as response:
        yield response


def lines(server, content, **headers):
    with asked(server, content, **headers) as response:
        return response.status, [json.loads(line) for line in response]


def text_of(server, content):
    status, found = lines(server, content)
    assert status == 200 and found[-1] == {"end": True}, found[-1]
    return "".join(line["text"] for line in found[1:-1])


def generated(server, capsys, **settings):
    """What generate prints."""
    assert generate.main(generate.Settings(str(server.model), **SHORT | settings)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("without", [(), ("two",), ("one", "two")])
def test_a_text_is_that_of_generate(server, capsys, without):
    text = text_of(server, {"prompt": "The ", "without": without, **SHORT})
    assert text and f"The {text}\n" == generated(server, capsys, prompt=("The ",), without=without)


def test_a_conversation_is_that_of_generate(server, capsys, tmp_path):
    turns = ["hi", "and you?"]
    (tmp_path / "turns.txt").write_text("\n".join(turns))
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = text_of(server, {"messages": messages, "system": "Be x.", **SHORT})
        messages.append({"role": "assistant", "content": answer})
    shown = "".join(f"> {turn}\n{messages[2 * n + 1]['content']}\n" for n, turn in enumerate(turns))
    assert shown == generated(server, capsys, chat=True, system="Be x.", prompt_file=tmp_path / "turns.txt")


def test_each_token_has_the_weights_of_its_candidates(server, capsys):
    status, found = lines(server, {"prompt": "The ", "without": ["one"], **SHORT})
    assert status == 200 and found[0] == {"names": ["trunk", "two"], "turns_left_out": 0, "tokens_left_out": 0}
    for token in found[1:-1]:
        assert sum(token["heads"]) == pytest.approx(1, abs=1e-3) == sum(token["layers"])
    printed = generated(server, capsys, prompt=("The ",), without=("one",), show_routing=True)
    means = [sum(values) / len(values) for values in zip(*(token["heads"] for token in found[1:-1]), strict=True)]
    stretches = re.findall(r"^ *(\d+)-(\d+) +heads trunk (\d+)%", printed, re.M)
    shown = sum((int(end) - int(start) + 1) * int(share) for start, end, share in stretches) / len(found[1:-1])
    assert shown == pytest.approx(100 * means[0], abs=1)


def test_one_text_at_a_time_and_a_browser_that_leaves_ends_its_own(server):
    with asked(server, ENDLESS) as response:
        assert b"names" in response.readline() and b"text" in response.readline(), "tokens come before the text ends"
        status, [problem] = lines(server, {"prompt": "x", **SHORT})
        assert status == 503 and problem["error"].startswith("busy: ")
        assert b"text" in response.readline(), "the first one goes on"
    assert text_of(server, {"prompt": "x", **SHORT})


def test_only_the_page_itself_may_ask(server):
    own, other = f"127.0.0.1:{server.port}", f"evil.example:{server.port}"
    for headers in (
        {"Host": other, "Origin": f"http://{other}"},
        {"Host": f"127.0.0.1:{server.port + 1}", "Origin": f"http://127.0.0.1:{server.port + 1}"},
        {"Host": f"x@{own}", "Origin": f"http://x@{own}"},
        {"Host": "[", "Origin": "http://["},
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": f"http://{other}"},
        {"Origin": f"https://{own}"},
        {"Origin": f"http://localhost:{server.port}"},
    ):
        assert lines(server, {"prompt": "x", **SHORT}, **headers)[0] == 403, headers
    assert lines(server, {"prompt": "x"}, **{"Content-Type": "text/plain"})[0] == 415, "which a form could send"
    local = f"localhost:{server.port}"
    assert lines(server, {"prompt": "x", **SHORT}, Host=local, Origin=f"http://{local}")[0] == 200
    for host, status in {own: 200, local: 200, other: 403, "127.0.0.1": 403}.items():
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/", headers={"Host": host})
        response = connection.getresponse()
        assert response.status == status and response.headers["X-Frame-Options"] == "DENY"
        connection.close()
    listening = psutil.Process(server.process.pid).net_connections()
    assert {one.laddr.ip for one in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"temperature": -1}, "temperature is -1. Give 0 "),
        ({"temperature": "hot"}, "temperature is 'hot'. Give a number"),
        (b'{"temperature": NaN}', "temperature is nan. "),
        ({"top_p": 0}, "top-p is 0. "),
        ({"max_new_tokens": 0}, "max-new-tokens is 0. "),
        ({"max_new_tokens": 1.5}, "max new tokens is 1.5. Give a whole number"),
        ({"max_new_tokens": True}, "max new tokens is True"),
        ({"seed": 2**70}, "seed is "),
        ({"prompt": 3}, "must be texts"),
        ({"without": "one"}, "list of names"),
        ({"height": 3}, "unknown field 'height'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "is not a text of the user"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]}, "ends with the user"),
        ([], "not a JSON object"),
        (b"{", "not JSON"),
        ({"prompt": "\ud800"}, "not UTF-8"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not UTF-8"),
        ({"prompt": "x", "temperature": 1e-42}, "at least 1e-06"),
        (b"[" * 100000, "not JSON"),
    ],
)
def test_a_bad_request_is_one_message(server, content, problem):
    status, [line] = lines(server, content)
    assert status == 400 and problem in line["error"]


def test_what_goes_wrong_later_is_the_last_line(server):
    assert "three: no such module" in lines(server, {"prompt": "x", "without": ["three"]})[1][-1]["error"]
    assert "OverflowError" in lines(server, {"prompt": "x", "temperature": 10**400})[1][-1]["error"]
    assert "OverflowError" in server.out.read_text(), "the console has the traceback"
    assert text_of(server, {"prompt": "x", **SHORT})
    status, [line] = lines(server, {}, **{"Content-Length": str(1 << 30)})
    assert status == 413 and "4,194,304 bytes" in line["error"]


def test_a_refused_request_gets_its_message_whatever_its_size(server):
    """A connection that is closed before it is read is reset, and the client sees no message."""
    content = b"x" * (20 << 20)
    status, [line] = lines(server, content)
    assert status == 413 and "4,194,304 bytes" in line["error"]
    status, [line] = lines(server, content, Origin="null")
    assert status == 403 and "only the page" in line["error"]


def test_a_long_prompt_loses_its_beginning(server):
    found = lines(server, {"prompt": "x" * 9000, "max_new_tokens": 1})[1]
    assert found[0]["tokens_left_out"] == 9000 - 8191 and "text" in found[1]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: the other tests speak HTTP")
def test_a_conversation_in_a_browser(server, tmp_path):
    with browser.Browser(f"http://127.0.0.1:{server.port}/", tmp_path) as page:
        use(page, server)


def use(page, server):
    """A conversation, the same without a module, a text as it is with a bad field, and the button Stop."""
    page.until("document.activeElement.name === 'text'")  # one can type at once
    page.type("[name=seed]", "5")
    page.type("[name=max_new_tokens]", "30")
    page.type("textarea", EVIL)
    page.press("Enter")
    page.until("document.querySelectorAll('.token').length > 3")
    page.until("/tokens, .*seed 5$/.test(document.getElementById('status').textContent)")
    messages = [{"role": "user", "content": EVIL}]
    spoken = "[...document.querySelectorAll('.turn:last-child .text')].at(-1).textContent"
    answer = text_of(server, {"messages": messages, **SHORT})
    assert page.value(spoken) == answer
    assert page.value("document.querySelector('.asked').textContent") == EVIL
    assert page.value("document.querySelectorAll('img').length") == 0, "what is typed is text"
    shown = "[...document.querySelectorAll('.turn:last-child .token')].map(t => [t.dataset.candidate, {}])"
    pairs = page.value(shown.format("getComputedStyle(t).getPropertyValue('--c').trim()"))
    colours = {"trunk": "7", "one": "0", "two": "1"}
    names = page.value("['--c7', '--c0', '--c1'].map(n => getComputedStyle(document.body).getPropertyValue(n).trim())")
    by_name = dict(zip(colours, names, strict=True))
    assert pairs and all(by_name[name] == colour for name, colour in pairs)
    backgrounds = dict(page.value(shown.format("getComputedStyle(t).backgroundColor")))
    assert "rgba(0, 0, 0, 0)" not in backgrounds.values()
    assert "weights of the heads  " in page.value("document.querySelector('.token').dataset.tip")

    page.click("[value=one]")  # the module is switched off
    page.type("textarea", "again")
    page.press("Enter")
    page.until("document.querySelectorAll('.turn').length === 2 && !document.getElementById('send').disabled")
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "again"}]
    assert page.value(spoken) == text_of(server, {"messages": messages, "without": ["one"], **SHORT})
    assert "one" not in [name for name, _ in page.value(shown.format("0"))]

    page.click("[name=plain]")
    page.type("[name=top_p]", "0")
    page.type("textarea", "The")
    page.press("Enter")
    page.until("document.querySelector('.problem')?.textContent.startsWith('top-p is 0. ')")
    page.type("[name=top_p]", "1")
    page.type("[name=max_new_tokens]", "100000")
    page.type("[name=temperature]", "0")
    page.press("Enter")
    page.until("parseInt(document.getElementById('status').textContent) > 3")
    page.click("#stop")
    page.until("document.getElementById('status').textContent.endsWith('stopped')")
    assert text_of(server, {"prompt": "x", **SHORT}), "the server is free again"
    assert [entry for entry in page.console if "400" not in entry] == []


def test_other_addresses_only_when_asked(server):
    session = SimpleNamespace()
    assert "Name another port" in small_artifacts.refused(Server, "127.0.0.1", server.port, "", session)
    assert "cannot be used" in small_artifacts.refused(Server, "127.0.0.1", 70000, "", session)
    with Server("0.0.0.0", 0, "", session) as everywhere:
        for host, own in {"192.168.0.9": True, "[fe80::1]": True, "localhost": True, "evil.example": False}.items():
            assert everywhere.is_own(f"{host}:{everywhere.port}") == own, host


def test_flags_that_do_not_fit_the_model(server):
    assert "Leave out --module" in small_artifacts.refused(
        chat.main, chat.Settings(str(server.model), server.folder / "trunk")
    )
    trunk = str(server.folder / "trunk")
    assert "Leave out --top-k" in small_artifacts.refused(chat.main, chat.Settings(trunk, top_k=1))
    assert "missing is not there" in small_artifacts.refused(chat.main, chat.Settings("missing"))
    assert "--top-k -1 is negative" in small_artifacts.refused(chat.main, chat.Settings(str(server.model), top_k=-1))


def test_markup_in_the_names_of_models_is_shown_as_text():
    found = Page(chat_page(EVIL, ["trunk", EVIL], chat=True, defaults={}))
    assert "img" not in found.tags and EVIL in found.text


def test_ctrl_c_ends_it_in_the_middle_of_a_text(server):
    with asked(server, ENDLESS) as response:
        response.readline()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(launch.PATIENCE) == 0
        assert b"was ended" in response.read().splitlines()[-1]
    assert "Traceback" not in server.out.read_text().split("OverflowError")[-1]
