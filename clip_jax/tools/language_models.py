"""Language models that rewrite captions, behind one interface: a list of `Request` in, a list of texts in, `NoAnswer` where there is none.

http://HOST:PORT/v1[#MODEL]   an endpoint in the manner of OpenAI's, of vLLM, llama.cpp and others: {URL}/completions; a URL that ends
                              in /chat/completions is asked by messages. The environment's OPENAI_API_KEY is sent if there is one
transformers:MODEL            a model of Hugging Face's transformers, a name or a folder; that package and torch have to be installed
offline                       no language model: synonyms of WordNet, words that the record has beside its caption, and templates
"""

import concurrent.futures
import dataclasses
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request

import numpy as np

from clip_jax.data.text_augment import read_thesaurus, replace_word
from clip_jax.errors import UserError

KINDS = ("http://HOST:PORT/v1[#MODEL]", "transformers:MODEL", "offline")


@dataclasses.dataclass(frozen=True)
class Request:
    """One rewrite that is wanted.

    Attributes:
      prompt: the demonstrations and the caption, see `clip_jax.tools.rewrite.make_prompt`.
      caption: the caption alone, on one line.
      family: whose demonstrations these are.
      words: what the record says of the picture beside the caption.
      seed: of this request's randomness.
    """

    prompt: str
    caption: str
    family: str = ""
    words: tuple[str, ...] = ()
    seed: int = 0


class NoAnswer(Exception):
    """In the place of a text; `args[0]` is the reason, a short one under which it is counted."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How texts are drawn from a language model; the defaults are LaCLIP's. Raises UserError for wrong values."""

    temperature: float = 0.9
    top_p: float = 0.95
    max_tokens: int = 77

    def __post_init__(self):
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.max_tokens >= 1):
            given = f"--temperature={self.temperature} >= 0, 0 < --top-p={self.top_p} <= 1 and --max-tokens={self.max_tokens} >= 1"
            raise UserError(f"{given} do not all hold")


def make_language_model(spec, sampling=Sampling(), timeout=60.0):
    """A function `list[Request] -> list[str | NoAnswer]`; raises UserError for a model that is not there."""
    if spec == "offline":
        return offline
    if spec.startswith("transformers:"):
        return Transformers(spec.removeprefix("transformers:"), sampling)
    url = spec.removeprefix("http:") if spec.startswith(("http:http://", "http:https://")) else spec
    if url.startswith(("http://", "https://")):
        return Http(url, sampling, timeout)
    raise UserError(f"--llm={spec}: allowed are {', '.join(KINDS)}")


@dataclasses.dataclass(frozen=True)
class Http:
    """An endpoint in the manner of OpenAI's. A request that fails is repeated `retries` times, after `pause`, 2 `pause`, ... seconds."""

    url: str
    sampling: Sampling = Sampling()
    timeout: float = 60.0
    retries: int = 2
    pause: float = 1.0
    parallel: int = 16

    def __call__(self, requests):
        with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._ask, requests))

    def _ask(self, request):
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(attempt * self.pause)
            try:
                return self._text(self._post(request))
            except TimeoutError:
                failure = NoAnswer(f"no answer within {self.timeout:g} s")
            except urllib.error.HTTPError as error:
                failure = NoAnswer(f"HTTP status {error.code}")
                if error.code < 500 and error.code not in (408, 429):  # asking again would not help
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                failure = NoAnswer(
                    "no answer in time" if isinstance(reason, TimeoutError) else f"no connection ({reason})"
                )
            except (ValueError, KeyError, IndexError, TypeError):
                failure = NoAnswer("an answer without a text")
        return failure

    def _post(self, request):
        url, _, model = self.url.partition("#")
        url = url if url.endswith("/completions") else url.rstrip("/") + "/completions"
        body = dataclasses.asdict(self.sampling) | {"model": model, "seed": request.seed, "stop": ["\n"]}
        is_chat = url.endswith("/chat/completions")
        body |= {"messages": [{"role": "user", "content": request.prompt}]} if is_chat else {"prompt": request.prompt}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=self.timeout
        ) as answer:
            return answer.read(2**20)

    @staticmethod
    def _text(answer):
        choice = json.loads(answer)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if not isinstance(text, str):
            raise TypeError
        return text


class Transformers:
    """A causal language model of Hugging Face's transformers. What is drawn for requests together follows from the first one's seed."""

    MAX_PROMPT = 400  # tokens; of longer prompts the beginning stays, and the arrow after it (LaCLIP)

    def __init__(self, name, sampling):
        self._torch, transformers = import_transformers(f"--llm=transformers:{name}")
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left")
            self._model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--llm=transformers:{name}: {str(error).splitlines()[0]}") from None
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._torch.cuda.is_available():
            self._model.to("cuda")
        drawn = (
            dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p) if sampling.temperature else {}
        )
        self._options = dict(max_new_tokens=sampling.max_tokens, pad_token_id=self._tokenizer.pad_token_id, **drawn)

    def __call__(self, requests):
        self._torch.manual_seed(requests[0].seed)
        inputs = self._tokenizer([self._short(r.prompt) for r in requests], padding=True, return_tensors="pt").to(
            self._model.device
        )
        with self._torch.inference_mode():
            ids = self._model.generate(**inputs, **self._options)[:, inputs["input_ids"].shape[1] :]
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _short(self, prompt):
        ids = self._tokenizer(prompt)["input_ids"]
        if len(ids) <= self.MAX_PROMPT - 5:
            return prompt
        return self._tokenizer.decode(ids[: self.MAX_PROMPT - 10], skip_special_tokens=True) + " =>"


def import_transformers(needed_by):
    """`(torch, transformers)`; raises UserError when one of them is not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"{needed_by}: {error.name} is not installed: pip install torch transformers") from None
    return torch, transformers


#: Of a family those templates that the request can fill; {synonym} is the caption with a synonym for one of its words.
_TEMPLATES = {
    "chatgpt": (
        "a picture of {synonym}",
        "an image that shows {synonym}",
        "a view of {synonym}, {word}",
        "{synonym} is to be seen here",
    ),
    "bard": (
        "{caption} with {words}",
        "{synonym}, together with {words}",
        "{caption}: {words}",
        "{word}: an image of {caption}",
    ),
    "coco": (
        "there is {caption} in this picture",
        "a photo of {caption}, {word}",
        "this is {caption}",
        "{caption} and {word}",
    ),
    "human": (
        "{words}, {caption}",
        "{word} and {synonym}",
        "{word}: {caption}",
        "a {word} one, {caption}",
        "just {caption}",
    ),
}


def offline(requests):
    """Rewrites without a language model: a synonym, some of the words and a template of the family, or of any."""
    return [_offline(request) for request in requests]


def _offline(request):
    rng = random.Random(request.seed)
    used = request.caption.lower()
    words = [word for word in request.words if word.lower() not in used]
    synonym = replace_word(request.caption.split(), np.random.default_rng(request.seed), read_thesaurus())
    values = {"caption": request.caption, "synonym": " ".join(synonym)}
    if words:
        values |= {"word": rng.choice(words), "words": ", ".join(rng.sample(words, min(len(words), rng.randint(2, 3))))}
    for templates in (_TEMPLATES.get(request.family, ()), sum(_TEMPLATES.values(), ())):
        if usable := [t for t in templates if words or "{word" not in t]:
            return rng.choice(usable).format(**values)
