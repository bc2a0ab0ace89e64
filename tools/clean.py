"""What one text loses: markup, invisible characters, boilerplate, personal data. And the rules it breaks.

The limits are those of C4 (Raffel et al. 2020, section 2.2) and Gopher (Rae et al. 2021, appendix A1.1). They
were made for pages of English prose: a poem, a chat or a program breaks them. tools/prepare.py applies them.
"""
import bisect
import functools
import html
import ipaddress
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lib.program import UserError
from tools.repeats import judge_words, words_of


@dataclass
class CleanConfig:
    # what changes a text, in this order
    markup: bool = True  # HTML: tags, scripts, menus and comments go; entities are decoded once
    emoji: Literal["text", "keep", "drop"] = "text"  # text: :thumbs_up_sign:
    tidy: bool = True  # Unicode in NFC, no invisible characters, white space
    c4: Literal["on", "strict", "off"] = "on"  # C4's rules; strict: lines that end like no sentence go, too
    mask: bool = True  # mail and IP addresses, card and phone numbers become [mail], [ip], [card], [phone]
    # what removes a document
    script: str = ""  # half of the letters are in one of these, as in LATIN,GREEK; empty: any
    quality: bool = True  # Gopher's rules on words, lines and symbols
    repetition: bool = True  # Gopher's rules on lines, paragraphs and n-grams that repeat
    min_words: int = 50  # of a document, by Gopher
    stop_words: int = 2  # of the eight commonest English words, how many a document must have, by Gopher
    min_sentences: int = 5  # of a document, by C4


TAGS = "|".join("""a abbr article aside b blockquote body br button center code dd div dl dt em figure font
    footer form h[1-6] head header hr html i iframe img input li link main meta nav noscript ol option p pre
    script section select small span strong style sub sup svg table td th title tr u ul""".split())
TAG = re.compile(rf"</?(?:{TAGS})(?:[\s/][^<>]*)?>", re.I)
BREAK = re.compile(r"(?i)</?(p|div|br|li|[uod]l|d[dt]|h[1-6r]|t[rdh]|table|section|article)(?:[\s/][^<>]*)?>")
UNREAD = re.compile(r"<(script|style|nav|footer|form|head|aside|noscript|svg|iframe|button|select)"
                    r"(?:\s[^<>]*)?>.{0,100000}?</\1\s*>|<!--.{0,100000}?-->|<!doctype[^<>]*>", re.I | re.S)
INVISIBLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff]")
SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
SIGN = ("(?:[\u231a\u231b\u23e9-\u23f3\u2600-\u2653\u2660-\u2668\u2670-\u2775\u2795-\u2797\u27a1\u27b0"
        "\u27bf\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\U0001f000-\U0001f1e5\U0001f200-\U0001faff]|"
        "[\xa9\xae\u203c-\u3299](?=\ufe0f))[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]*")
EMOJI = re.compile(f"[\U0001f1e6-\U0001f1ff]{{2}}|[0-9#*]\ufe0f?\u20e3|{SIGN}(?:\u200d{SIGN})*")
UNWANTED = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
            "use cookies")  # a line with one of these is no prose
MAIL = re.compile(r"[\w.+-]{1,64}@(?:[\w-]+\.)+[^\W\d_]{2,}\b")
IPV4 = re.compile(r"\d(?<![\w.]\d)\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])[23][\da-fA-F]{3}(?::[\da-fA-F]{0,4}){2,7}(?![\w:])")
CARD = re.compile(r"(?:[3-6]\d|2[2-7])(?<![\w.-]\d\d)(?:\d{11,17}|\d\d([ -])"
                  r"(?:\d{4}\1\d{4}\1\d{4}|\d{6}\1\d{5}))(?![\w-])")
PHONE = re.compile(r"[(\d](?<![\w.-][(\d])(?:[-. ]\(?\d)?\d{2,3}(?:\) ?|[-. ])\d{3}[-. ]\d{4}(?![\w-])|"
                   r"(?<![\w.)])\+[1-9](?:[ ().-]{0,2}\d){7,14}(?!\d)")
PICTURE = re.compile("[\ufe0f\u20e3\u231a-\u2bff\U0001f000-\U0001faff]")  # some of it is in each emoji
COMMON = {*b"the be to of and that have with".split()}
SENTENCE = re.compile(r"[.?!]['\")\]\u201d\u2019]*(?=\s|$)")  # its end


def strip_markup(text: str) -> str:
    """A text without any of these tags only has its entities decoded. &copy without ; is none: a=1&copy=2."""
    if "<" in text and TAG.search(text):
        page = re.match(r"\s*<", text) and text.rstrip().endswith(">") and "<pre" not in text
        text = re.sub(r"\s+", " ", text) if page else text  # a page may break its lines anywhere
        text = TAG.sub("", BREAK.sub("\n", UNREAD.sub("\n", text)))
        text = re.sub(r" *\n *", "\n", text) if page else text
    return re.sub(r"&#?\w{1,32};", lambda entity: html.unescape(entity[0]), text) if "&" in text else text


def name_of(emoji: re.Match) -> str:
    """:woman_personal_computer:, the names of all signs of a sequence. A flag is :flag_d_e:."""
    signs = re.sub("[\ufe0e\ufe0f\u200d\u20e3\U000e007f]", "", emoji[0])
    names = "_".join(unicodedata.name(sign, "emoji") for sign in signs)
    names = re.sub("REGIONAL INDICATOR SYMBOL LETTER", "FLAG", names, count=1)
    names = re.sub("(REGIONAL|TAG)[A-Z ]* LETTER |EMOJI MODIFIER FITZPATRICK ", "", names)
    return f":{re.sub('[^A-Z0-9]+', '_', names).lower()}:"


def no_emoji(text: str, names: bool) -> str:
    """What is invisible goes first: it may part a sequence."""
    if text.isascii() or not PICTURE.search(text):
        return text
    return EMOJI.sub(name_of if names else "", INVISIBLE.sub("", text))


def tidy(text: str) -> str:
    """NFC comes last: what stood between a letter and its accent may be gone. Not NFKC: it turns x² to x2."""
    text = INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    if not text.isascii():
        text = SPACE.sub(" ", text.replace("\u2028", "\n").replace("\u2029", "\n"))
        text = unicodedata.normalize("NFC", text)
    lines = [re.sub(r"(?<=\S)\s+", " ", line) if "  " in line or "\t" in line else line
             for line in map(str.rstrip, text.split("\n"))]
    text = "\n".join(lines).strip("\n")
    return re.sub(r"\n{3,}", "\n\n", text) if "\n\n\n" in text else text


def c4_lines(text: str, strict: bool) -> str:
    """Without the lines that C4 drops. Empty ones stay: they part paragraphs."""
    def unwanted(line: str) -> bool:
        lower = line.lower()
        return any(words in lower for words in UNWANTED)

    def good(line: str) -> bool:
        sentence = line.endswith((".", "?", "!", '"', "'")) and not line.endswith("...")
        return not line or line.isspace() or (
            len(line.split(None, 2)) > 2 and (sentence or not strict)
            and not (any_unwanted and unwanted(line))
            and (len(line) <= 1000 or max(map(len, line.split())) <= 1000))
    any_unwanted = unwanted(text)
    text = re.sub(r"\[(?:\d*|edit|citation needed)\]", "", text) if "[" in text else text
    return "\n".join(filter(good, text.split("\n")))


def luhn(digits: str) -> bool:
    """From the right, each second digit counts twice, less 9 if above 9. The sum ends in 0 (ISO/IEC 7812)."""
    twice = [2 * int(digit) - 9 * (digit > "4") for digit in digits[-2::-2]]
    return (sum(twice) + sum(map(int, digits[::-2]))) % 10 == 0


def unless_private(address: re.Match) -> str:
    try:
        return "[ip]" if ipaddress.ip_address(address[0]).is_global else address[0]
    except ValueError:
        return address[0]


def mask(text: str) -> str:
    """All of a kind become one word: that needs no table and depends on no other document."""
    text = MAIL.sub("[mail]", text) if "@" in text else text
    for sign, pattern in (r"\.\d+\.", IPV4), (r":[\da-fA-F]*:", IPV6):
        text = pattern.sub(unless_private, text) if re.search(sign, text) else text
    if re.search(r"\d(?:[ ().-]{0,2}\d){6}", text):
        text = CARD.sub(lambda match: "[card]" if luhn(re.sub(r"\D", "", match[0])) else match[0], text)
        text = PHONE.sub("[phone]", text)
    return text


@functools.cache
def script_of(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0]


def edits(cfg: CleanConfig) -> dict[str, Callable[[str], str]]:
    """{rule: what it does to a text}, in order."""
    found = {"markup": cfg.markup and strip_markup,
             "emoji": cfg.emoji != "keep" and functools.partial(no_emoji, names=cfg.emoji == "text"),
             "tidy": cfg.tidy and tidy,
             "C4: lines": cfg.c4 != "off" and functools.partial(c4_lines, strict=cfg.c4 == "strict"),
             "personal data": cfg.mask and mask}
    return {rule: edit for rule, edit in found.items() if edit}


def faults(text: str, words: list[bytes], cfg: CleanConfig) -> Iterator[str]:
    """The names of the rules that a text with these words breaks. Of lines and paragraphs that repeat the
    extra ones count."""
    lines, n = [line.strip() for line in text.split("\n") if line.strip()], len(words)
    if not n:
        yield "no words"
    if cfg.tidy and 1000 * text.count("\ufffd") > len(text):
        yield "broken characters"
    if cfg.script:
        letters = [script_of(letter) for letter in text[:1000] if letter.isalpha()]
        if 2 * sum(name in cfg.script.upper().split(",") for name in letters) < len(letters):
            yield "script"
    if cfg.c4 != "off":
        broken = {"lorem ipsum": "lorem ipsum" in text.lower(), "brace": "{" in text,
                  "sentences": len(SENTENCE.findall(text)) < cfg.min_sentences}
        yield from (f"C4: {rule}" for rule, breaks in broken.items() if breaks)
    if cfg.quality:
        length, dotted = len(b"".join(words).decode()), sum(line.endswith(("...", "…")) for line in lines)
        broken = {"words": not cfg.min_words <= n <= 100000,
                  "length of words": not 3 * n <= length <= 10 * n,
                  "symbols": 10 * max(text.count("#"), text.count("...") + text.count("…")) > n,
                  "bullets": 10 * sum(line[0] in "•‣●-*" for line in lines) > 9 * len(lines),
                  "ellipses": 10 * dotted > 3 * len(lines),
                  "numbers": 10 * sum(map(bytes.isdigit, words)) > 2 * n,
                  "common words": len(COMMON.intersection(words)) < cfg.stop_words}
        yield from (f"Gopher: {rule}" for rule, breaks in broken.items() if breaks)
    for kind, parts in (("lines", lines), ("paragraphs", text.split("\n\n"))) if cfg.repetition else ():
        once, length = set(parts), sum(map(len, parts))
        if 10 * len(once) < 7 * len(parts) or 5 * sum(map(len, once)) < 4 * length:
            yield f"Gopher: {kind} that repeat"


def size(text: str) -> int:
    return len(text.encode())


def remove(line: dict, rule: str) -> None:
    text = line.pop("text")
    line["rules"].append([rule, size(text), text[:200]])


def clean(part: list[tuple], cfg) -> bytes:
    """A line of JSON for each of some documents: what is left, and what each rule changed or removed."""
    found, left, documents, steps = [], [], [], edits(cfg)
    for source, path, where, text in part:
        found.append(line := {"input": source, "file": path, "source": where, "rules": []})
        if isinstance(text, UserError):
            line["left_out"] = str(text)
            continue
        line["read"] = size(text)
        for rule, edit in steps.items():
            if (new := edit(text)) != text:
                at = bisect.bisect(range(len(new)), False, key=lambda i: text[: i + 1] != new[: i + 1])
                line["rules"].append([rule, size(text) - size(new), text[max(0, at - 40) : at + 160]])
                text = new
        line["text"], words = text, words_of(text)
        if rule := next(faults(text, words, cfg), ""):
            remove(line, rule)
        else:
            left.append(line)
            documents.append(words)
    digests, bands, broken = judge_words(documents, cfg)
    for line, digest, keys in zip(left, digests, bands):
        line.update(digest=digest, bands=keys.tobytes().hex())
    for i, rule in broken.items():
        remove(left[i], rule)
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in found)
