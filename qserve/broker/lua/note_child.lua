-- NOTE_CHILD: note in the record of a durable call that it has made another one, which lies in another shard.
-- KEYS[1] record of the one that made it | ARGV[1] id of the other
-- returns nothing
note_child(KEYS[1], ARGV[1])
