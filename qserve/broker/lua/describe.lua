#!lua flags=allow-oom
-- DESCRIBE: everything about a durable call but its result, and how many calls are before it in its queue.
-- KEYS[1] record | ARGV[1] base, ARGV[2] most to count, ARGV[3] event after which to begin, ARGV[4] group
-- returns false | {fields, position or -1, {number, event, ...}, 1 if it is past its time and nobody has noticed}
local names = {'state', 'deployment', 'kind', 'method', 'attempts', 'submitted', 'started', 'ended', 'due', 'expires',
  'error', 'progress', 'entry', 'n', 'low', 'parts'}
local found = redis.call('HMGET', KEYS[1], unpack(names))
if not found[1] then return false end
local position = -1
if found[1] == 'queued' and found[13] then
  local stream = ARGV[1] .. 'q:' .. found[2]
  local groups = redis.call('EXISTS', stream) == 1 and redis.call('XINFO', 'GROUPS', stream) or {}
  for _, group in ipairs(groups) do
    local last = '0-0'
    for i = 1, #group, 2 do
      if group[i] == 'last-delivered-id' then last = group[i + 1] end
    end
    position = #redis.call('XRANGE', stream, '(' .. last, '(' .. found[13], 'COUNT', ARGV[2])
  end
end
local fields, events = {}, {}
for i, name in ipairs(names) do
  if found[i] then fields[#fields + 1] = name fields[#fields + 1] = found[i] end
end
local last, after = tonumber(found[14] or '0') - tonumber(found[16] or '0'), tonumber(ARGV[3])
local first = found[16] and 1 or after + 1
for place = math.max(first, last - EVENTS_KEPT + 1), last do
  local event = redis.call('HGET', KEYS[1], 'e' .. place)
  if event then
    local number, rest = string.match(event, '^(%d+) (.*)$')
    number = tonumber(number or place)
    if number > after then events[#events + 1] = number events[#events + 1] = rest or event end
  end
end
local late = found[10] and (found[1] == 'queued' or found[1] == 'scheduled') and now_ms() > tonumber(found[10])
return {fields, position, events, late and 1 or 0}
