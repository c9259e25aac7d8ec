#!lua flags=allow-oom
-- REPLY: acknowledge, delete and answer in one step; the first finisher wins, so a call has one reply.
-- May run beyond maxmemory: answering is what frees memory.
-- KEYS[1] call stream, KEYS[2] inbox of the caller, KEYS[3] liveness of the caller
-- ARGV[1] group, ARGV[2] ms an unread inbox is kept, ARGV[3] '1': drop the replies if the caller seems dead, then per
-- reply: entry id, frame
-- returns how many of the replies were the first for their entry | -1 the caller seems dead, nothing was done: when the
-- clock of this server jumps, every liveness expires at once, and comes back when the caller speaks next
-- The replies of one message stand in one entry of the inbox, field by field: a command from a script costs as much as
-- what it does, and a large entry would be copied as it grows.
local alive = redis.call('EXISTS', KEYS[3]) == 1
if not alive and ARGV[3] ~= '1' then return -1 end
local most_replies, most_bytes = 100, 65536
local first, entries, message, size = 0, {}, {}, 0
local function send()
  redis.call('XDEL', KEYS[1], unpack(entries))
  if alive then redis.call('XADD', KEYS[2], '*', unpack(message)) end
  first = first + #entries
  entries, message, size = {}, {}, 0
end
for i = 4, #ARGV, 2 do
  if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 then
    entries[#entries + 1] = ARGV[i]
    message[#message + 1] = 'd'
    message[#message + 1] = ARGV[i + 1]
    size = size + #ARGV[i + 1]
    if #entries >= most_replies or size >= most_bytes then send() end
  end
end
if #entries > 0 then send() end
if alive and first > 0 then redis.call('PEXPIRE', KEYS[2], ARGV[2]) end
return first
