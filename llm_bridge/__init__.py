"""From tokens of a video and a question to words: prompts, any Hugging Face language model, and decoding.

An answer's way through this room:

    prompt.render           messages with videos -> Prompt: token ids with places for embeddings
    model.VideoLanguageModel encode and project: pixels -> VisionTokens -> embeddings (M, D)
    generation.Generation   prompt + embeddings -> text pieces: prefill what `kv_cache` lacks, then decode
    compute_worker          the one thread that computes it all; several answers share a decoding step
    sampling                logits -> the next token

Loading: `llm` (any causal language model, frozen), `adapters` (LoRA), `model_files` (folders by strangers are
checked before a library reads them), `assets` (the default language model and the cache folder). Same bits for
an answer in any company: `batch_invariance`. Training: `packing` (rows of a batch), `attention` and `lora` (faster
backward passes on CPUs). Text towers of the contrastive stages: `text_encoders`.

Importing this package imports nothing else.
"""
