#!lua flags=allow-oom
-- REPLY: acknowledge, delete and answer in one step; the first finisher wins, so a call has one reply.
-- May run beyond maxmemory: answering is what frees memory.
-- KEYS[1] call stream, KEYS[2] inbox of the caller, KEYS[3] liveness of the caller
-- ARGV[1] group, ARGV[2] ms an unread inbox is kept, ARGV[3] '1': drop the replies if the caller seems dead, then per
-- reply: entry id, frame
-- returns how many of the replies were the first for their entry | -1 the caller seems dead, nothing was done: when the
-- clock of this server jumps, every liveness expires at once, and comes back when the caller speaks next
local alive = redis.call('EXISTS', KEYS[3]) == 1
if not alive and ARGV[3] ~= '1' then return -1 end
local first = 0
for i = 4, #ARGV, 2 do
  if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 then
    redis.call('XDEL', KEYS[1], ARGV[i])
    first = first + 1
    if alive then redis.call('XADD', KEYS[2], '*', 'd', ARGV[i + 1]) end
  end
end
if alive and first > 0 then redis.call('PEXPIRE', KEYS[2], ARGV[2]) end
return first
