#!lua flags=allow-oom
-- NOTE_PROGRESS: record how far a running call has come, and tell those who wait for it or follow it.
-- KEYS[1] record | ARGV[1] base, ARGV[2] entry id, ARGV[3] frame, ARGV[4] ms an unread inbox is kept, ARGV[5] which attempt
-- returns 1 | 0 the call is not this entry's any more, or another attempt has begun
local found = redis.call('HMGET', KEYS[1], 'state', 'entry', 'n', 'waiters', 'attempts')
if found[1] ~= 'running' or found[2] ~= ARGV[2] or found[5] ~= ARGV[5] then return 0 end
note(KEYS[1], found[3], now_ms(), 'progress', ARGV[3], 'progress', ARGV[3])
tell(ARGV[1], found[4], ARGV[3], ARGV[4])
return 1
