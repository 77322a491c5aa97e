"""Files to frames.

The way of a video: `sources` opens what the caller gave as one regular file; `reader` sends it to a child
process of `sandbox` (its `worker`), which confines itself (`confine`), reads the header (`containers`,
`geometry`, `images`), chooses frames (`frame_times`) and decodes them (`backends`, `heif`); `protocol` checks
what comes back; the result is a `reader.Clip`. Images that are in memory already go through `in_memory`.
"""
