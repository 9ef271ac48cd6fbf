-- Wireshark and tshark understand the files of `vhost-user trace --pcapng` with this plugin.
--
--     vhost-user trace --print-dissector > ~/.local/lib/wireshark/plugins/vhost_user.lua
--     tshark -X lua_script:vhost_user.lua -r trace.pcapng
--
-- The tables come from the package's own table of messages, and are filled in when it is printed.

--@TABLES@

local proto = Proto("vhost_user", "vhost-user")

local events = { [0] = "message", "bytes", "opened", "closed", "note" }
local parties = { [0] = "front-end", "back-end" }
local channels = { [0] = "main", "back-end" }
local kinds = { [0] = "other", "memfd", "file", "eventfd", "socket", "pipe (reading end)", "pipe (writing end)" }

local f = {
    event = ProtoField.uint8("vhost_user.event", "Event", base.DEC, events),
    direction = ProtoField.uint8("vhost_user.direction", "From", base.DEC, parties),
    channel = ProtoField.uint8("vhost_user.channel", "Channel", base.DEC, channels),
    connection = ProtoField.uint32("vhost_user.connection", "Connection"),
    device = ProtoField.string("vhost_user.device", "Device"),
    descriptors = ProtoField.uint16("vhost_user.descriptors", "Descriptors"),
    descriptor = ProtoField.none("vhost_user.descriptor", "Descriptor"),
    kind = ProtoField.uint8("vhost_user.descriptor.kind", "Kind", base.DEC, kinds),
    offset = ProtoField.uint32("vhost_user.descriptor.offset", "Came with byte"),
    size = ProtoField.uint64("vhost_user.descriptor.size", "Size"),
    request = ProtoField.uint32("vhost_user.request", "Request"),
    name = ProtoField.string("vhost_user.name", "Name"),
    flags = ProtoField.uint32("vhost_user.flags", "Flags", base.HEX),
    payload_size = ProtoField.uint32("vhost_user.size", "Payload size"),
    answer = ProtoField.bool("vhost_user.answer", "Answer"),
    feature = ProtoField.string("vhost_user.feature", "Feature"),
    request_in = ProtoField.framenum("vhost_user.request_in", "Request in", base.NONE, frametype.REQUEST),
    answer_in = ProtoField.framenum("vhost_user.answer_in", "Answer in", base.NONE, frametype.RESPONSE),
    latency = ProtoField.relative_time("vhost_user.latency", "Latency"),
    rest = ProtoField.bytes("vhost_user.rest", "Bytes"),
    text = ProtoField.string("vhost_user.text", "Note"),
}

local malformed = ProtoExpert.new("vhost_user.malformed", "malformed", expert.group.MALFORMED, expert.severity.ERROR)
proto.experts = { malformed }

-- A field of the protocol for every field of a payload.
local makers = {
    unsigned = {
        [1] = function(abbr, name) return ProtoField.uint8(abbr, name) end,
        [2] = function(abbr, name) return ProtoField.uint16(abbr, name) end,
        [4] = function(abbr, name) return ProtoField.uint32(abbr, name) end,
        [8] = function(abbr, name) return ProtoField.uint64(abbr, name, base.DEC_HEX) end,
    },
    signed = { [8] = function(abbr, name) return ProtoField.int64(abbr, name) end },
}

local all = {}
for _, field in pairs(f) do table.insert(all, field) end

local function make_fields(prefix, fields)
    for _, field in ipairs(fields) do
        local abbr = prefix .. "." .. field.name
        if field.shape == "structure" or field.shape == "structures" then
            field.field = ProtoField.none(abbr, field.name)
            table.insert(all, field.field)
            make_fields(abbr, field.parts)
        elseif field.shape == "bits" then
            for _, part in ipairs(field.parts) do
                part.field = ProtoField.uint32(prefix .. "." .. part.name, part.name)
                table.insert(all, part.field)
            end
        elseif field.shape ~= "padding" then
            local makers_of_shape = makers[field.shape]
            if makers_of_shape then
                field.field = makers_of_shape[field.size](abbr, field.name)
            elseif field.shape == "words" then
                field.field = ProtoField.uint64(abbr, field.name)
            else
                field.field = ProtoField.bytes(abbr, field.name)
            end
            table.insert(all, field.field)
        end
    end
end

for _, payload in ipairs(payloads) do make_fields("vhost_user." .. payload.abbr, payload.fields) end
proto.fields = all

local function payload_of(name, size)
    local found
    for _, payload in ipairs(payloads) do
        if payload.name == name then
            if payload.size == size then return payload end
            if not payload.size then found = payload end
        end
    end
    return found
end

-- Requests that are not answered yet, and what was found out in the first pass, by number of the packet.
local unanswered, request_of, answer_of, latency_of = {}, {}, {}, {}

-- By connection: what the back-end is, once that was plain. Packets before are understood when they are looked at again.
local types = {}

function proto.init()
    types = {}
    unanswered, request_of, answer_of, latency_of = {}, {}, {}, {}
end

local function match(pinfo, key, request, is_answer)
    local waiting = unanswered[key] or {}
    unanswered[key] = waiting
    if not is_answer then
        table.insert(waiting, { request = request, number = pinfo.number, time = pinfo.abs_ts })
        return
    end
    for at, asked in ipairs(waiting) do
        if asked.request == request then
            request_of[pinfo.number] = asked.number
            answer_of[asked.number] = pinfo.number
            local passed = pinfo.abs_ts - asked.time
            local seconds = math.floor(passed)
            latency_of[pinfo.number] = NSTime.new(seconds, math.floor((passed - seconds) * 1e9 + 0.5))
            for _ = 1, at do table.remove(waiting, 1) end
            return
        end
    end
end

local function unsigned(range, little)
    if little then return range:le_uint() end
    return range:uint()
end

local function add(tree, field, range, little)
    if little then return tree:add_le(field, range) end
    return tree:add(field, range)
end

-- Bits of a number, of which the lower half is enough.
local function part_of(range, little, part)
    local word = little and range:le_uint64() or range:uint64()
    return math.floor(word:lower() / 2 ^ part.shift) % 2 ^ part.width
end

-- Returns how many bytes the fields have, and the first number among them.
local function add_fields(tree, fields, tvb, offset, length, little)
    local used, first = 0, nil
    for _, field in ipairs(fields) do
        local size = field.size > 0 and field.size or length - field.offset
        if field.offset + size > length or size < 0 then return used, first end
        used = math.max(used, field.offset + size)
        local at = offset + field.offset
        if size == 0 then
            -- there is nothing to show
        elseif field.shape == "unsigned" or field.shape == "signed" then
            add(tree, field.field, tvb(at, size), little)
            first = first or (size <= 4 and unsigned(tvb(at, size), little)) or nil
        elseif field.shape == "bytes" then
            tree:add(field.field, tvb(at, size))
        elseif field.shape == "words" then
            for word = 0, size - 8, 8 do add(tree, field.field, tvb(at + word, 8), little) end
        elseif field.shape == "bits" then
            for _, part in ipairs(field.parts) do
                tree:add(part.field, tvb(at, size), part_of(tvb(at, size), little, part))
            end
        elseif field.shape == "structure" then
            local below = tree:add(field.field, tvb(at, size))
            add_fields(below, field.parts, tvb, at, size, little)
        elseif field.shape == "structures" then
            local count = math.min(first or 0, math.floor(size / field.stride))
            for number = 0, count - 1 do
                local begin = at + number * field.stride
                local below = tree:add(field.field, tvb(begin, field.stride))
                below:set_text(field.name .. " " .. number)
                add_fields(below, field.parts, tvb, begin, field.stride, little)
            end
        end
    end
    return used, first
end

local function add_features(tree, bits, own, range, little)
    local word = little and range:le_uint64() or range:uint64()
    for bit = 0, 63 do
        local half = bit < 32 and word:lower() or word:higher()
        if math.floor(half / 2 ^ (bit % 32)) % 2 == 1 then
            tree:add(f.feature, range, bits[bit] or own[bit] or ("bit " .. bit))
        end
    end
end

local function dissect_message(tvb, pinfo, tree, offset, channel, direction, connection, little)
    local length = tvb:len() - offset
    if length < 12 then
        tree:add_proto_expert_info(malformed, "shorter than a header")
        return
    end
    local request = unsigned(tvb(offset, 4), little)
    local size = unsigned(tvb(offset + 8, 4), little)
    local is_answer = channel ~= direction
    local row = requests[channel][request]
    local name = row and row.name or ("request " .. request)

    add(tree, f.request, tvb(offset, 4), little)
    tree:add(f.name, tvb(offset, 4), name)
    add(tree, f.flags, tvb(offset + 4, 4), little)
    add(tree, f.payload_size, tvb(offset + 8, 4), little)
    tree:add(f.answer, tvb(offset + 4, 4), is_answer):set_generated()
    pinfo.cols.info = name .. (is_answer and " (answer)" or "")

    if not pinfo.visited then match(pinfo, connection .. "/" .. channel, request, is_answer) end
    if request_of[pinfo.number] then
        tree:add(f.request_in, request_of[pinfo.number]):set_generated()
        tree:add(f.latency, latency_of[pinfo.number]):set_generated()
    end
    if answer_of[pinfo.number] then tree:add(f.answer_in, answer_of[pinfo.number]):set_generated() end

    local at, left = offset + 12, length - 12
    if left ~= size then
        tree:add_proto_expert_info(malformed, "announces " .. size .. " bytes of payload, has " .. left)
    end
    if not row then
        tree:add_proto_expert_info(malformed, "unknown " .. name)
        if left > 0 then tree:add(f.rest, tvb(at, left)) end
        return
    end
    local payload_name = row.payload
    if is_answer then
        payload_name = (row.answered ~= "always" and left == 8) and "U64" or row.answer
    end
    local payload = payload_of(payload_name, left)
    local used = add_fields(tree, payload.fields, tvb, at, left, little)
    if row.bits and left == 8 and is_answer == (row.answered == "always") then
        local device = name:find("PROTOCOL") == nil and types[connection]
        add_features(tree, row.bits, device and device.bits or {}, tvb(at, 8), little)
    end
    if used == 0 and #payload.fields > 0 then
        tree:add_proto_expert_info(malformed, "too short for " .. payload_name)
    end
    if used < left then tree:add(f.rest, tvb(at + used, left - used)) end
end

function proto.dissector(tvb, pinfo, root)
    pinfo.cols.protocol = "vhost-user"
    local tree = root:add(proto, tvb())
    if tvb:len() < 16 then
        tree:add_proto_expert_info(malformed, "shorter than the pseudo-header")
        return
    end
    local little = tvb(0, 2):le_uint() == 1
    local event, direction, channel = tvb(2, 1):uint(), tvb(3, 1):uint(), tvb(4, 1):uint()
    local count, connection = unsigned(tvb(6, 2), little), unsigned(tvb(8, 4), little)
    tree:add(f.event, tvb(2, 1))
    tree:add(f.direction, tvb(3, 1))
    tree:add(f.channel, tvb(4, 1))
    add(tree, f.descriptors, tvb(6, 2), little)
    add(tree, f.connection, tvb(8, 4), little)
    types[connection] = device_types[unsigned(tvb(12, 4), little)] or types[connection]
    if types[connection] then tree:add(f.device, tvb(12, 4), types[connection].name) end
    pinfo.cols.src = parties[direction] or "?"
    pinfo.cols.dst = parties[1 - direction] or "?"

    local offset = 16
    for number = 1, count do
        if offset + 16 > tvb:len() then
            tree:add_proto_expert_info(malformed, "descriptor " .. number .. " of " .. count .. " is cut off")
            return
        end
        local below = tree:add(f.descriptor, tvb(offset, 16))
        below:add(f.kind, tvb(offset, 1))
        add(below, f.offset, tvb(offset + 4, 4), little)
        add(below, f.size, tvb(offset + 8, 8), little)
        offset = offset + 16
    end

    if event == 0 and requests[channel] then
        dissect_message(tvb, pinfo, tree, offset, channel, direction, connection, little)
    elseif offset < tvb:len() then
        local field = event == 4 and f.text or f.rest
        tree:add(field, tvb(offset))
        pinfo.cols.info = events[event] or "?"
    else
        pinfo.cols.info = events[event] or "?"
    end
end

DissectorTable.get("wtap_encap"):add((wtap_encaps or wtap).USER0, proto)
