-- FIND: look for calls by their ids among the newest entries of a queue.
-- KEYS[1] call stream | ARGV[1] ms: how old the oldest of them can be, then ids
-- returns an entry id or false per call
local wanted, missing, found = {}, 0, {}
for i = 2, #ARGV do
  wanted[ARGV[i]] = i - 1
  found[i - 1] = false
  missing = missing + 1
end
local now = redis.call('TIME')
local oldest = string.format('%.0f', math.max(0, now[1] * 1000 - tonumber(ARGV[1])))
local newest = '+'
while missing > 0 do
  local entries = redis.call('XREVRANGE', KEYS[1], newest, oldest, 'COUNT', 50)
  for _, entry in ipairs(entries) do
    -- fields: r, id, f, flags, d, frame
    local place = wanted[entry[2][2]]
    if place and not found[place] then
      found[place] = entry[1]
      missing = missing - 1
    end
  end
  if #entries < 50 then break end
  newest = '(' .. entries[50][1]
end
return found
