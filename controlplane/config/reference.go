package config

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

const referenceIntro = `# Configuration of dstack-gw

<!-- Written by "go run ./controlplane/config/gendoc" from controlplane/config/table.go. Change it there. -->

## Where values come from

Later ones win. Tables are merged key by key; lists and single values are replaced.

1. the defaults on this page
2. ` + "`/etc/gateway/gateway.toml`, then `/etc/gateway/gateway.json`" + `
3. ` + "`./gateway.toml`, then `./gateway.json`" + `
4. the file of ` + "`-c`" + `. It must exist. Only a file named ` + "`*.toml`" + ` is read as TOML, every other one as JSON. A relative path that does not exist in the working directory is looked for in the directories above it.
5. the environment variable ` + "`DSTACK_GW_CONFIG`" + `, base64 of TOML, for deployments whose files are fixed by a measurement

A key that no version has known is reported with the nearest known one and ignored; ` + "`dstack-gw config check`" + ` makes it an error. ` + "`dstack-gw config print`" + ` shows what all layers together mean and where each value was set, without secrets.

| Environment variable | Effect |
|---|---|
| ` + "`RUST_LOG`" + ` | levels of the log: ` + "`info`, `debug,acme=trace`, `warn,certs=off`" + `. Without it: ` + "`info`" + ` |
| ` + "`DSTACK_GATEWAY_ADMIN_TOKEN`, `ADMIN_API_TOKEN`" + ` | admin token, when ` + "`core.admin.auth_token`" + ` is empty; the first one that is set |
| ` + "`DSTACK_GW_CONFIG`" + ` | last layer, see above |

## Notation

| Type | Notation |
|---|---|
| duration | whole number and one of ` + "`s`, `m`, `h`, `d`" + `, or ` + "`never`" + `. No fractions, no combinations |
| address | ` + "`ip`, `ip:port`, `[ip6]:port`, `tcp:ip:port`, `unix:/path`" + ` |
| port or range | ` + "`443`, `\"443\"`, `\"443-543\"`" + ` |
| size | bytes as a number, or ` + "`\"64KiB\"`, `\"10MiB\"`, `\"2GB\"`" + ` |
| CIDR | ` + "`a.b.c.d/n`" + ` |

"Since" is the upstream version whose files can have the key; ` + "`" + ours + "`" + ` marks keys that upstream does not have. Keys without an entry were always there.
`

// GenerateReference writes the reference page (Markdown) of all keys.
func GenerateReference(w io.Writer) error {
	var b strings.Builder
	b.WriteString(referenceIntro)
	for _, s := range table(new(Config)) {
		if s.repeat {
			continue
		}
		title := "`[" + s.path + "]`"
		if s.path == "" {
			title = "Top level"
		}
		fmt.Fprintf(&b, "\n## %s\n\n%s", title, s.doc)
		if s.since != "" {
			fmt.Fprintf(&b, " Since: %s.", s.since)
		}
		b.WriteString("\n\n| Key | Type | Default | Since | Meaning |\n|---|---|---|---|---|\n")
		for _, k := range s.keys {
			if !k.repeat {
				fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", k.name, k.typeName(), k.defaultText(), k.since, k.doc)
			}
		}
	}

	b.WriteString("\n## Old and future keys\n\nThey load with a warning.\n\n| Key | Versions | Now |\n|---|---|---|\n")
	var framework []string
	for _, r := range retiredKeys() {
		if r.when == "all" {
			if !strings.HasPrefix(r.path, "core.") {
				framework = append(framework, "`"+r.path+"`")
			}
			continue
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", r.path, r.when, r.now)
	}
	slices.Sort(framework)
	fmt.Fprintf(&b, "\nSettings of upstream's HTTP framework without effect, at the top level, in `[core.admin]` and in `[core.debug]`: %s.\n", strings.Join(framework, ", "))
	_, err := io.WriteString(w, b.String())
	return err
}

func (k *key) defaultText() string {
	switch {
	case k.derived != "":
		return k.derived
	case k.def == nil:
		return "unset"
	}
	return "`" + literal(k.def) + "`"
}
