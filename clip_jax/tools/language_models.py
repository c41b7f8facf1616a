"""Language models that rewrite captions, behind one interface.

A model is a function `[Request, ...] -> [text or NoAnswer, ...]`. It is named by one of

    http://HOST:PORT/v1[#MODEL]   an endpoint with OpenAI's protocol, such as vLLM or llama.cpp. Prompts go to
                                  {URL}/completions; a URL that ends in /chat/completions gets them as messages.
                                  OPENAI_API_KEY of the environment is sent if it is set.
    transformers:MODEL            a model of Hugging Face transformers, by name or folder. Needs transformers and torch.
    offline                       no language model: WordNet synonyms, words of the record, and templates
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
    """A request for one rewrite.

    Attributes:
      prompt: the demonstrations and the caption, see `clip_jax.tools.rewrite.make_prompt`.
      caption: the caption alone, on one line.
      family: the family of the demonstrations.
      words: further words of the record on the image.
      seed: of this request's random choices.
    """

    prompt: str
    caption: str
    family: str = ""
    words: tuple[str, ...] = ()
    seed: int = 0


class NoAnswer(Exception):
    """An answer without a text; `args[0]` is the reason, a short category under which it is counted."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How texts are sampled from a language model; the defaults are LaCLIP's.

    Attributes:
      temperature: at least 0; 0 is greedy decoding.
      top_p: probability mass of nucleus sampling, in (0, 1].
      max_tokens: the longest answer, in tokens.

    Raises UserError for an invalid value.
    """

    temperature: float = 0.9
    top_p: float = 0.95
    max_tokens: int = 77

    def __post_init__(self):
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.max_tokens >= 1):
            raise UserError(
                f"--temperature={self.temperature} must be at least 0, --top-p={self.top_p} above 0 and at most 1, "
                f"--max-tokens={self.max_tokens} at least 1"
            )


def make_language_model(spec, sampling=Sampling(), timeout=60.0):
    """Returns the function `[Request, ...] -> [text or NoAnswer, ...]` of a language model.

    Args:
      spec: one of `KINDS`.
      sampling: how texts are sampled.
      timeout: seconds to wait for an HTTP answer.

    Raises UserError for an unknown kind, and when a transformers model fails to load.
    """
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
    """An endpoint with OpenAI's protocol.

    Attributes:
      url: `URL` or `URL#MODEL`.
      sampling: how texts are sampled.
      timeout: seconds to wait for an answer.
      retries: how often a failed request is repeated.
      pause: seconds before the first repetition; the wait before repetition n is n times as long.
      parallel: requests at a time.
    """

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
                if error.code < 500 and error.code not in (408, 429):  # a repetition would fail too
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
    """A causal language model of Hugging Face transformers.

    Random choices for a list of requests follow from the seed of the first one.

    Raises UserError when transformers or torch is not installed or the model cannot be loaded.
    """

    MAX_PROMPT = 400  # tokens; a longer prompt is cut at its end and the arrow is put back (LaCLIP)

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
    """Returns the modules `(torch, transformers)`.

    Raises UserError, which begins with `needed_by`, when one of them is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"{needed_by}: {error.name} is not installed: pip install torch transformers") from None
    return torch, transformers


#: Templates of each family. {synonym} is the caption with a synonym for one of its words; {word} and {words} are words
#: of the record.
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
    """Returns rewrites made without a language model, from a synonym, some words of the record and a template.

    The template belongs to the request's family, or to any family when the request fits none of its templates.
    """
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
