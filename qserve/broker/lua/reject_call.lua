#!lua flags=allow-oom
-- REJECT_CALL: move an entry that is no call of ours to the dead letters; the durable call whose entry it was ends as dead.
-- KEYS[1] call stream, KEYS[2] dead-letter stream, KEYS[3] record
-- ARGV[1] base, ARGV[2] group, ARGV[3] entry id, ARGV[4] id, ARGV[5] result frame, ARGV[6] ms the record is kept,
-- ARGV[7] ms an unread inbox is kept, ARGV[8] reason, ARGV[9] most dead letters kept
-- returns 1 if the entry was still ours to give up
local base, entry, id = ARGV[1], ARGV[3], ARGV[4]
if redis.call('XACK', KEYS[1], ARGV[2], entry) == 0 then return 0 end
local letter = bury(KEYS[1], KEYS[2], entry, nil, ARGV[8], ARGV[9])
local found = redis.call('HMGET', KEYS[3], 'state', 'entry')
-- Anybody may have put an entry with this id; only the call's own one ends it.
if found[1] and not ENDED[found[1]] and found[2] == entry then
  redis.call('HSET', KEYS[3], 'error', ARGV[8], 'letter', letter or '')
  finish(base, id, now_ms(), 'dead', ARGV[5], ARGV[6], ARGV[7], ARGV[8])
end
return 1
