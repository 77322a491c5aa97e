"""From tokens of a video and a question to words: prompts, any Hugging Face language model, and decoding.

An answer's way through this room:

    prompt.render             messages with videos -> Prompt: token ids with places for embeddings
    model.VideoLanguageModel  encode and project: pixels -> VisionTokens -> embeddings (M, D)
    generation.Generation     prompt + embeddings -> text pieces: prefill what `kv_cache` lacks, then decode
    compute_worker            the one thread that computes it all; several answers share a decoding step
    sampling                  logits -> the next token

Loading: `llm` (any causal language model, frozen), `adapters` (LoRA), `model_files` (checks of folders that
strangers wrote), `assets` (the default language model, the cache folder). `batch_invariance` gives an answer
the same bits in any batch. Training: `packing` (rows of a batch), `attention` and `lora` (faster backward
passes on CPUs). `text_encoders`: text towers of the contrastive stages.

Importing this package imports nothing else.
"""
