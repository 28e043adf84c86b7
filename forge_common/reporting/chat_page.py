"""The page of forge_common.chat. chat.js sends what is typed to the server, and shows the tokens of the response as
they come.
"""

from collections.abc import Sequence
from html import escape

from .page import candidate_colours, embedded, page

SETTINGS = {  # field of a request -> label, and the attributes of its input
    "temperature": ("temperature", 'min="0" step="any"'),
    "top_p": ("top-p", 'min="0" max="1" step="any"'),
    "max_new_tokens": ("max tokens", 'min="1" step="1"'),
    "seed": ("seed", 'step="1" placeholder="random"'),
}


def chat_page(title: str, names: Sequence[str], *, chat: bool, defaults: dict[str, float]) -> str:
    """names: the candidates, the trunk first. chat: the model has a chat template.

    defaults: of the fields; the others are empty.
    """
    colours = candidate_colours(len(names))
    inputs = "".join(
        f'<label>{label} <input type="number" name="{name}" value="{defaults.get(name, "")}" {attributes}></label>'
        for name, (label, attributes) in SETTINGS.items()
    )
    switches = "".join(
        f'<label style="--c:var(--c{colour})"><input type="checkbox" name="module" value="{escape(name)}" checked>'
        f"<span>{escape(name)}</span></label>"
        for name, colour in zip(names[1:], colours[1:], strict=True)
    )
    if switches:
        switches = (
            f'<fieldset class="modules"><legend>modules</legend><label style="--c:var(--c{colours[0]})">'
            f'<input type="checkbox" checked disabled><span>{escape(names[0])}</span></label>{switches}</fieldset>'
        )
    system = '<label class="system">system message <input name="system"></label>' if chat else ""
    plain = '<label><input type="checkbox" name="plain"> continue the text as it is</label>' if chat else ""
    hint = "Enter sends, Shift+Enter begins a new line."
    if len(names) > 1:
        hint += (
            " The colour of a token is the candidate whose head has the largest weight; point at it for all weights."
        )
    return page(
        title,
        (
            '<div id="log" class="log"></div>',
            '<form id="ask">',
            f'<label class="typed">{"message" if chat else "text to continue"} <textarea name="text" rows="3"></textarea></label>',
            '<div class="row"><button id="send">Send</button><button id="stop" type="button" disabled>Stop</button>'
            '<button id="clear" type="button">Clear</button><span id="status" role="status"></span></div>',
            f'<div class="row">{inputs}{system}{plain}</div>',
            f"{switches}</form>",
            f"<p>{hint}</p>",
            "<noscript><p>This page needs JavaScript.</p></noscript>",
            embedded("model", {"names": list(names), "colours": colours, "chat": chat}),
        ),
        program="chat",
    )
