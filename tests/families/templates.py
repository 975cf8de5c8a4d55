"""Chat templates that write what the families' published ones write, shortened: no tools, no video, no dates.

Each takes content as a string or as parts, and drops nothing: a part that is neither image nor text is an error.
"""


def _parts(image: str, text: str = "part['text']") -> str:
    """A turn's content with ``image`` for each picture and ``text`` for each text, in the order given."""
    return (
        "{%- if message['content'] is string -%}"
        "{%- set part = {'text': message['content']} -%}{{- " + text + " -}}"
        "{%- else -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- " + repr(image) + " -}}"
        "{%- elif part['type'] == 'text' -%}{{- " + text + " -}}"
        "{%- else -%}{{- raise_exception('no part ' + part['type']) -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    )


def _images_first(image: str, text: str = "part['text']") -> str:
    """All of a turn's pictures, then its texts, whatever their order."""
    return (
        "{%- for part in message['content'] if part['type'] == 'image' -%}{{- " + repr(image) + " -}}{%- endfor -%}"
        "{%- for part in message['content'] if part['type'] == 'text' -%}{{- " + text + " -}}{%- endfor -%}"
    )


def _each(body: str, generation: str) -> str:
    loop = "{%- for message in messages -%}" + body + "{%- endfor -%}"
    return loop + "{%- if add_generation_prompt -%}{{- " + repr(generation) + " -}}{%- endif -%}"


def chatml(image: str = "", default_system: str = "") -> str:
    """Qwen2-VL (a default system turn), Qwen3-VL, InternVL (a newline after each picture), LLaVA-OneVision."""
    system = (
        "{%- if loop.first and message['role'] != 'system' -%}"
        "{{- '<|im_start|>system\\n" + default_system + "<|im_end|>\\n' -}}{%- endif -%}"
    )
    turn = "{{- '<|im_start|>' + message['role'] + '\\n' -}}" + _parts(image) + "{{- '<|im_end|>\\n' -}}"
    return _each((system if default_system else "") + turn, "<|im_start|>assistant\n")


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
ASSISTANT = "You are a helpful assistant."
QWEN2_VL = chatml(QWEN_IMAGE, ASSISTANT)
QWEN2 = chatml("", ASSISTANT)
QWEN3_VL = chatml(QWEN_IMAGE)
INTERNVL = chatml("<IMG_CONTEXT>\n")
FAST_VLM = chatml("<image>", ASSISTANT)

# LLaVA-OneVision: the pictures of a turn go first; no newline after the end token.
LLAVA_ONEVISION = _each(
    "{{- '<|im_start|>' + message['role'] + ' ' -}}"
    + _images_first("<image>\n", "'\\n' + part['text']")
    + "{{- '<|im_end|>' -}}",
    "<|im_start|>assistant\n",
)

# LLaVA 1.5 (Vicuna): no begin of text, which the tokenizer adds; a blank before the answer; marks for the answer.
LLAVA = _each(
    "{%- if message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' -}}"
    "{%- generation -%}" + _images_first("") + "{{- '</s>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- 'USER: ' if message['role'] == 'user' -}}"
    + _images_first("<image>\n")
    + "{{- ' ' -}}{%- endif -%}",
    "ASSISTANT:",
)

# LLaVA-NeXT (Mistral 7B): no begin of text either; a blank after the end token.
LLAVA_NEXT = _each(
    "{%- if message['role'] == 'assistant' -%}{{- ' ' -}}" + _images_first("") + "{{- '</s> ' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '[INST] ' -}}" + _images_first("<image>\n") + "{{- ' [/INST]' -}}"
    "{%- else -%}{{- '<<SYS>>\n' -}}" + _images_first("") + "{{- '\n<</SYS>>\n\n' -}}{%- endif -%}",
    "",
)

# SmolVLM and Idefics3: one opening for the whole conversation, a blank before an answer, an end-of-utterance token.
IDEFICS3 = "{{- bos_token -}}" + _each(
    "{{- message['role'] | capitalize -}}"
    "{{- ':' if message['content'][0]['type'] == 'image' else ': ' -}}"
    + _parts("<image>")
    + "{{- '<end_of_utterance>\n' -}}",
    "Assistant:",
)

# Gemma: texts are stripped; roles alternate; Gemma 2 knows no system turn, Gemma 3 puts it into the first user turn.
_GEMMA_TURN = (
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}{%- endif -%}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}"
    "{{- lead.text if loop.first -}}"
) + (_parts("<start_of_image>", "part['text'] | trim") + "{{- '<end_of_turn>\n' -}}")
_SYSTEM = (
    "{%- set lead = namespace(text='', rest=messages) -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set content = messages[0]['content'] -%}"
    "{%- set lead.text = (content if content is string else content[0]['text']) + '\\n\\n' -%}"
    "{%- set lead.rest = messages[1:] -%}{%- endif -%}"
)
_GEMMA_REST = _each(_GEMMA_TURN, "<start_of_turn>model\n").replace("in messages", "in lead.rest", 1)
GEMMA3 = "{{- bos_token -}}" + _SYSTEM + _GEMMA_REST
GEMMA2 = (
    "{{- bos_token -}}{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}"
    "{%- endif -%}{%- set lead = namespace(text='', rest=messages) -%}" + _GEMMA_REST
)

# Pixtral puts the system turn into the last user turn; Mistral Small 3.1 gives it marks of its own.
PIXTRAL = "{{- bos_token -}}" + _SYSTEM + _each(
    "{%- if message['role'] == 'user' -%}{{- '[INST]' -}}"
    "{{- lead.text if loop.revindex <= 2 -}}"
    + _parts("[IMG]")
    + "{{- '[/INST]' -}}{%- else -%}" + _parts("") + "{{- eos_token -}}{%- endif -%}",
    "",
).replace("in messages", "in lead.rest", 1)  # fmt: skip
MISTRAL3 = "{{- bos_token -}}" + _each(
    "{%- if message['role'] == 'user' -%}{{- '[INST]' -}}" + _parts("[IMG]") + "{{- '[/INST]' -}}"
    "{%- elif message['role'] == 'system' -%}{{- '[SYSTEM_PROMPT]' -}}" + _parts("") + "{{- '[/SYSTEM_PROMPT]' -}}"
    "{%- else -%}" + _parts("") + "{{- eos_token -}}{%- endif -%}",
    "",
)


def llama3(image: str = "", default_system: str = "") -> str:
    """Llama 3 (texts are stripped) and PerceptionLM."""
    header = "'<|start_header_id|>' + {} + '<|end_header_id|>\\n\\n'"
    system = "{%- if messages[0]['role'] != 'system' -%}{{- " + header.format("'system'")
    system += " + '" + default_system + "<|eot_id|>' -}}{%- endif -%}"
    turn = "{{- " + header.format("message['role']") + " -}}" + _parts(image, "part['text'] | trim")
    turn += "{{- '<|eot_id|>' -}}"
    opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return "{{- bos_token -}}" + (system if default_system else "") + _each(turn, opening)


LLAMA3 = llama3()
PERCEPTION_LM = llama3("<|image|>", "You are a helpful language and vision assistant.")

PHI3 = _each(
    "{{- '<|' + message['role'] + '|>\n' -}}" + _parts("") + "{{- '<|end|>\n' -}}",
    "<|assistant|>\n",
) + "{%- if not add_generation_prompt -%}{{- eos_token -}}{%- endif -%}"  # fmt: skip

# Qwen3 and Qwen3.5: thoughts stay in the answers after the last question alone; there an answer without thoughts
# gets empty ones.
_THINKING = (
    "{%- if message['role'] != 'assistant' -%}" + _parts(QWEN_IMAGE) + "{%- else -%}"
    "{%- set content = message['content'] if message['content'] is string else message['content'][0]['text'] -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1] if '</think>' in content else '' -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') if '</think>' in content else content -%}"
    "{%- if loop.last -%}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}"
    "{%- else -%}{{- content -}}{%- endif -%}{%- endif -%}"
)
QWEN3 = _each(
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}" + _THINKING + "{{- '<|im_end|>\\n' -}}",
    "<|im_start|>assistant\n",
)
