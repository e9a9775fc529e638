"""Chat templates of the shapes that families have, in wording of our own; each with the tokens that it writes. And conversations."""

import random

from support import ROOT
from tokenizers import AddedToken

from moejax.data import chat
from moejax.data.conversation import read
from moejax.data.tokenizer import load_tokenizer

MISTRAL = """{{ bos_token }}{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}
{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}[INST] {{ system if loop.first else '' }}{{ m['content'] }} [/INST]
{%- elif m['role'] == 'tool' %}[TOOL_RESULTS] {{ m['content'] }}[/TOOL_RESULTS]
{%- elif m['tool_calls'] %}[TOOL_CALLS] {{ m['tool_calls'] | map(attribute='function') | list | tojson }}{{ eos_token }}
{%- elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}
{%- else %}{{ raise_exception('only user, assistant and tool') }}{% endif %}
{%- endfor %}"""

QWEN3 = """{%- if messages[0].role == 'system' or tools %}<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' else '' }}
{%- if tools %}
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}<|im_end|>
{% endif %}
{%- set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set said = m.content if m.content is string else '' %}{% set thought = m.reasoning_content or '' %}
{%- if not thought and '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>assistant
{% if loop.index0 > last.user and (loop.last or thought) %}<think>
{{ thought }}
</think>

{% endif %}{{ said }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

LLAMA3 = """{{- bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}
<|start_header_id|>system<|end_header_id|>

Today: {{ date_string }}
{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>
{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and model must take turns') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

HARMONY = """<|start|>system<|message|>Effort: {{ reasoning_effort or 'medium' }}<|end|>
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.tool_calls %}
{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif -%}
<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>
{{- m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- elif loop.last and not add_generation_prompt %}
{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""

DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}
{%- elif m['role'] == 'user' %}<｜User｜>{{ m['content'] }}
{%- else %}<｜Assistant｜>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<｜Assistant｜>{% endif %}"""

# Prompts that open a thinking: one that the template strips everywhere (DeepSeek-R1, QwQ), writes as it is given in the last turn alone
# (Nemotron Nano), writes where there is one (MiniMax, Qwen3's thinking models), or closes at once (DeepSeek-V3.1 with thinking).
R1 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}
{%- elif m['role'] == 'user' %}<｜User｜>{{ m['content'] }}
{%- else %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<｜Assistant｜><think>
{% endif %}"""

NANO = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] | trim }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>

{% endif %}"""

MINIMAX = """{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}
{%- endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}
{%- if not thought and '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- if thought and loop.index0 > last.user %}<think>
{{ thought }}
</think>

{% endif %}{{ said }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""

V31 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}
{%- else %}<｜Assistant｜></think>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"""

PHI = """{% for m in messages %}<|{{ m['role'] }}|>
{{ m['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""

# As Mistral's later ones: what the system says stands in the last question alone; and one that takes calls as DeepSeek's do, with text.
LAST = """{{ bos_token }}{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages %}{% if m.role == 'user' %}[INST] {{ system + '\\n\\n' if system and loop.last else '' }}{{ m.content }}[/INST]
{%- elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"""

TEXT_CALLS = """{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}<call>
{%- for call in m['tool_calls'] %}{{ call['function']['name'] + ' ' + call['function']['arguments'] }}{% endfor %}{{ eos_token }}
{%- elif m['role'] == 'assistant' %}<bot>{{ m['content'] + eos_token }}{% else %}<{{ m['role'] }}>{{ m['content'] + eos_token }}{% endif %}
{%- endfor %}"""

COMMAND = """{{ bos_token }}{% for m in messages %}<|START|><|{{ 'BOT' if m.role == 'assistant' else m.role | upper }}|>
{%- if m.role == 'assistant' %}<|SAY|>{% endif %}{{ m.content }}{% if m.role == 'assistant' %}<|SAID|>{% endif %}<|OVER|>{% endfor %}
{%- if add_generation_prompt %}<|START|><|BOT|><|SAY|>{% endif %}"""

GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

PLAIN = """{% for m in messages %}{{ 'Human: ' if m.role == 'user' else 'Bot: ' if m.role == 'assistant' else '' }}{{ m.content }}

{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}"""

_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_THINK = ("<think>", "</think>")
_CHATML = ("<|im_start|>", "<|im_end|>")
# name -> (template, its tokens, those of them that are not special)
TEMPLATES = {
    "mistral": (MISTRAL, ("[INST]", "[/INST]", "[TOOL_CALLS]", *_TOOLS), ()),
    "qwen3": (QWEN3, _CHATML, ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ()),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), ()),
    "harmony": (HARMONY, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"), ()),
    "deepseek": (DEEPSEEK, (), ("<｜User｜>", "<｜Assistant｜>")),
    "r1": (R1, (), ("<｜User｜>", "<｜Assistant｜>", *_THINK)),
    "nano": (NANO, _CHATML, _THINK),
    "minimax": (MINIMAX, _CHATML, _THINK),
    "v31": (V31, (), ("<｜User｜>", "<｜Assistant｜>", *_THINK)),
    "last": (LAST, (), ()),
    "text_calls": (TEXT_CALLS, (), ()),
    "phi": (PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), ()),
    "command": (COMMAND, ("<|START|>", "<|BOT|>", "<|USER|>", "<|SYSTEM|>", "<|SAY|>", "<|SAID|>", "<|OVER|>"), ()),
    "generation": (GENERATION, _CHATML, ()),
    "plain": (PLAIN, (), ()),
}  # fmt: skip
# name -> what its prompt opens, and what stands between thinking and answer
THINKING = {"r1": ("<think>\n", "\n</think>\n\n"), "nano": ("<think>\n\n", "\n</think>\n\n"), "minimax": ("<think>\n", "\n</think>\n\n"),
            "v31": ("<think>", "</think>")}  # fmt: skip
SPLIT = ("qwen3", "harmony")  # write an earlier answer otherwise than at use
DAY = "2026-03-09"
TODAY = {"date_string": "09 Mar 2026"}
WORDS = ["Tom", "has", "3", "apples", "12", "pears,", "Ann:", "how", "many?\n\nAnswer", "", "é", "🍎", "<b>x</b>", "{1}", "a_b"]


def make(name, base="tiny-mixtral", **variables):
    template, special, other = TEMPLATES[name]
    tokenizer = load_tokenizer(str(ROOT / "assets" / base))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special if text not in tokenizer.get_vocab()])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in other])
    tokenizer.chat_template = template
    chat.settle(tokenizer, "chat", variables, DAY)
    return tokenizer


def talks(count=12, system=True, seed=3):
    """Conversations of one to four answers."""
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 12))).strip() or "a"

    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": text()}] if system and draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        made.append(messages)
    return made


def records(conversations, **more):
    return [{"conversation": read({"messages": messages} | more)} for messages in conversations]


def rendered(tokenizer, messages, ask=False, **variables):
    """By `transformers`, whose lowest version knows a thought by its first name alone."""
    thoughts = [message.get("thinking", message.get("reasoning")) for message in messages]
    messages = [m if said is None else m | {"reasoning_content": said} for m, said in zip(messages, thoughts, strict=True)]
    dated = TODAY if "date_string" in tokenizer.chat_template else {}
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **dated, **variables)
