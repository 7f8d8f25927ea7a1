# lint.awk - the style limits that a machine can check. Prints one line per finding, nothing when clean.
#   awk -f tools/lint.awk -v tags=1 modelopt_q.h
# Rules: every tag of the contents has one banner, in order; no section over 800 lines; no function over 150 lines;
# function length: median at most 15, 90 % at most 60; comment-only lines 8 to 30 %; no forbidden words.
function say(text) { printf "%s:%d: %s\n", FILENAME, FNR, text }
function end_section() {
    if (section != "" && FNR - section_at > 800) printf "%s: section %s has %d lines, limit 800\n", FILENAME, section, FNR - section_at
}
BEGIN { functions = 0 }
{
    lines++
    if ($0 ~ /^[ ]*(\/\*|\*)/ || in_comment) comments++
    rest = $0
    while (1) {   # are we inside a comment at the end of this line?
        if (in_comment) { i = index(rest, "*/"); if (!i) break; rest = substr(rest, i + 2); in_comment = 0 }
        else { i = index(rest, "/*"); if (!i) break; rest = substr(rest, i + 2); in_comment = 1 }
    }
    if (length($0) > 170) say("line of " length($0) " characters, limit 170")
    if ($0 ~ /TODO|FIXME|XXX/) say("unfinished mark")
}
/^   >>[a-z0-9-]+ / && banner_before == FNR - 1 {
    end_section()
    section = $1
    section_at = FNR
    if (section in seen) say("second banner of " section)
    seen[section] = 1
    order[++banners] = section
}
/^\/\* ----------------------------------------/ { banner_before = FNR }
/^       .*>>[a-z]/ && section == "" {
    for (i = 1; i <= NF; i++) if ($i ~ /^>>[a-z0-9-]+$/) contents[$i] = 1
}
/^[A-Za-z_].*[^;]$/ && !/^(#|typedef|struct|enum|union|extern|static const|else|\/\*|case|default)/ { head = $0; head_at = FNR }
/^\{$/ { body_at = FNR; body_name = head }
/^\}$/ && body_at {
    n = FNR - body_at - 1
    length_of[++functions] = n
    if (n > 150) printf "%s:%d: function of %d lines, limit 150: %s\n", FILENAME, body_at, n, body_name
    body_at = 0
}
/^(static|MOQ_API|LLM_API).*\{.*\}$/ { length_of[++functions] = 1 }
END {
    end_section()
    if (tags) {
        for (t in contents) if (!(t in seen)) printf "%s: contents name %s, which has no banner\n", FILENAME, t
        for (t in seen) if (!(t in contents)) printf "%s: banner %s is not in the contents\n", FILENAME, t
        for (i = 1; i <= banners; i++) {   # bodies in the order of their declarations
            if (order[i] ~ /^>>api-/) { at[substr(order[i], 7)] = ++declared }
            else if (substr(order[i], 3) in at) {
                k = at[substr(order[i], 3)]
                if (k < last_body) printf "%s: body %s is out of order\n", FILENAME, order[i]
                last_body = k
            }
        }
    }
    if (functions > 20) {
        for (i = 2; i <= functions; i++) {   # insertion sort
            v = length_of[i]
            for (j = i - 1; j > 0 && length_of[j] > v; j--) length_of[j + 1] = length_of[j]
            length_of[j + 1] = v
        }
        if (length_of[int((functions + 1) / 2)] > 15) printf "%s: median function length %d, limit 15\n", FILENAME, length_of[int((functions + 1) / 2)]
        if (length_of[int(functions * 0.9)] > 60) printf "%s: 90 %% of functions have up to %d lines, limit 60\n", FILENAME, length_of[int(functions * 0.9)]
    }
    share = 100 * comments / lines
    if (share < 8 || share > 30) printf "%s: %d %% of the lines are comments, 8 to 30 wanted\n", FILENAME, share
}
