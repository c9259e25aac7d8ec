-- NOTE_CHILD: note in the record of a durable call that it has made another one, which lies in another shard.
-- KEYS[1] record
-- ARGV[1] id of the other one
note_child(KEYS[1], ARGV[1])
