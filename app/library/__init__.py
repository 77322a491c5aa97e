"""A library of videos: clips of some seconds, their features in one folder, found by what they show.

`library` is the front door; `embedders` turn clips and texts into vectors of one space; `video_files` finds
files and tells whether they changed; `clip_reader` decodes clips; `clip_table` keeps the rows; `indexing`
goes from files to rows; `commands` are `fluxchat index` and `fluxchat search`. `ask_all` asks one question
about all of them, `answers` keeps what it is told, and `map_command` is `fluxchat map`.
"""
