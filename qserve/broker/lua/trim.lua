#!lua flags=allow-oom
-- TRIM: delete what was read of an inbox, unless this is another inbox: when the server's clock jumps forward the old one
-- expires, and ids of the one that comes after it may be below those that were read.
-- KEYS[1] inbox | ARGV[1] id of the last message that was read
-- returns 1, 0 if this is another inbox, of which nothing was read
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not newest then return 1 end
local function parts(id) local ms, n = string.match(id, '^(%d+)-(%d+)$') return tonumber(ms), tonumber(n) end
local ms, n = parts(newest[1])
local read_ms, read_n = parts(ARGV[1])
if ms < read_ms or (ms == read_ms and n < read_n) then return 0 end
redis.call('XTRIM', KEYS[1], 'MINID', ARGV[1])
redis.call('XDEL', KEYS[1], ARGV[1])
return 1
