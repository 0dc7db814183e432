package agent

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
)

// policyOfCompose reads the port policy of a compose file (guest spec 4.1). The
// rest of the file is not used, but it must be one that a guest accepts: a
// policy is not taken out of a file that means something else to the guest.
func policyOfCompose(text []byte) (*gatewaypb.PortPolicy, error) {
	file, err := object(text)
	if err != nil {
		return nil, err
	}
	for _, field := range composeFields() {
		value, ok := file[field.name]
		if !ok {
			if field.required {
				return nil, fmt.Errorf("%s is missing", field.name)
			}
			continue
		}
		if !field.valid(value) {
			return nil, fmt.Errorf("%s is not %s", field.name, field.what)
		}
	}
	value, ok := file["port_policy"]
	if !ok {
		return &gatewaypb.PortPolicy{}, nil
	}
	policy, err := parsePolicy(value)
	if err != nil {
		return nil, fmt.Errorf("port_policy: %w", err)
	}
	return policy, nil
}

func parsePolicy(value json.RawMessage) (*gatewaypb.PortPolicy, error) {
	members, err := object(value)
	if err != nil {
		return nil, err
	}
	policy := new(gatewaypb.PortPolicy)
	if v, ok := members["restrict_mode"]; ok {
		if !isBool(v) {
			return nil, errors.New("restrict_mode is not a boolean")
		}
		policy.RestrictMode = string(v) == "true"
	}
	list, ok := members["ports"]
	if !ok {
		return policy, nil
	}
	var ports []json.RawMessage
	if !isArray(list) || json.Unmarshal(list, &ports) != nil {
		return nil, errors.New("ports is not an array")
	}
	for i, p := range ports {
		attrs, err := parsePort(p)
		if err != nil {
			return nil, fmt.Errorf("ports[%d]: %w", i, err)
		}
		// Guests up to 0.5.11 let port 0 pass. Nothing can connect to it, so it
		// allows nothing.
		if attrs.Port != 0 {
			policy.Ports = append(policy.Ports, attrs)
		}
	}
	return policy, nil
}

func parsePort(value json.RawMessage) (*gatewaypb.PortAttrs, error) {
	members, err := object(value)
	if err != nil {
		return nil, err
	}
	v, ok := members["port"]
	if !ok {
		return nil, errors.New("port is missing")
	}
	port, err := strconv.ParseUint(string(v), 10, 16)
	if err != nil {
		return nil, errors.New("port is not a number up to 65535")
	}
	attrs := &gatewaypb.PortAttrs{Port: uint32(port)}
	if v, ok := members["pp"]; ok {
		if !isBool(v) {
			return nil, errors.New("pp is not a boolean")
		}
		attrs.Pp = string(v) == "true"
	}
	return attrs, nil
}

type composeField struct {
	name     string
	required bool
	what     string
	valid    func(json.RawMessage) bool
}

// composeFields are the fields that a guest's parser gives a type to.
func composeFields() []composeField {
	optional := func(f func(json.RawMessage) bool) func(json.RawMessage) bool {
		return func(v json.RawMessage) bool { return string(v) == "null" || f(v) }
	}
	fields := []composeField{
		{"manifest_version", true, "1, 2 or a positive decimal in quotes", isManifestVersion},
		{"name", true, "a string", isString},
		{"runner", true, "a string", isString},
		{"features", false, "an array of strings", isStrings},
		{"docker_compose_file", false, "a string", optional(isString)},
		{"init_script", false, "a string or an array of at most 5", optional(isInitScript)},
		{"key_provider", false, "none, kms, local or tpm", optional(isKeyProvider)},
		{"key_provider_id", false, "hex", isHex},
		{"allowed_envs", false, "an array of strings", isStrings},
		{"storage_fs", false, "a string", optional(isString)},
		{"swap_size", false, "a size", func(v json.RawMessage) bool { return isString(v) || isUint(v) }},
		{"event_log_version", false, "1 or 2", func(v json.RawMessage) bool { return string(v) == "1" || string(v) == "2" }},
		{"snapshotter", false, "overlayfs or stargz", optional(isSnapshotter)},
		{"requirements", false, "an object", optional(isObject)},
		{"verity_volumes", false, "an array", isArray},
	}
	for _, name := range []string{
		"public_logs", "public_sysinfo", "public_tcbinfo", "kms_enabled", "gateway_enabled", "tproxy_enabled",
		"local_key_provider_enabled", "no_instance_id", "secure_time",
	} {
		fields = append(fields, composeField{name, false, "a boolean", isBool})
	}
	return fields
}

// object splits a JSON object into its members without touching their values.
// Names are compared exactly, unlike encoding/json does for structs, and a name
// given twice is an error: two readers could each see another policy.
func object(text []byte) (map[string]json.RawMessage, error) {
	if !json.Valid(text) {
		return nil, errors.New("not JSON")
	}
	d := json.NewDecoder(bytes.NewReader(text))
	if open, err := d.Token(); err != nil || open != json.Delim('{') {
		return nil, errors.New("not an object")
	}
	members := make(map[string]json.RawMessage)
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return nil, err
		}
		name, ok := token.(string)
		if !ok {
			return nil, errors.New("member name is not a string")
		}
		if _, twice := members[name]; twice {
			return nil, errors.New("a member is given twice")
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, err
		}
		members[name] = value
	}
	return members, nil
}

// The values below come out of valid JSON, so their first byte tells the type.

func isString(v json.RawMessage) bool { return v[0] == '"' }
func isArray(v json.RawMessage) bool  { return v[0] == '[' }
func isObject(v json.RawMessage) bool { return v[0] == '{' }
func isBool(v json.RawMessage) bool   { return v[0] == 't' || v[0] == 'f' }

func isUint(v json.RawMessage) bool {
	_, err := strconv.ParseUint(string(v), 10, 64)
	return err == nil
}

func isStrings(v json.RawMessage) bool {
	var items []json.RawMessage
	if !isArray(v) || json.Unmarshal(v, &items) != nil {
		return false
	}
	for _, item := range items {
		if !isString(item) {
			return false
		}
	}
	return true
}

func unquote(v json.RawMessage) (s string, ok bool) {
	return s, isString(v) && json.Unmarshal(v, &s) == nil
}

func isHex(v json.RawMessage) bool {
	s, ok := unquote(v)
	_, err := hex.DecodeString(s)
	return ok && err == nil
}

func isManifestVersion(v json.RawMessage) bool {
	s, quoted := unquote(v)
	if !quoted {
		return string(v) == "1" || string(v) == "2"
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return err == nil && n > 0 && s == strconv.FormatUint(n, 10)
}

func isInitScript(v json.RawMessage) bool {
	if isString(v) {
		return true
	}
	var items []json.RawMessage
	return isStrings(v) && json.Unmarshal(v, &items) == nil && len(items) <= 5
}

func isKeyProvider(v json.RawMessage) bool { return isOneOf(v, "none", "kms", "local", "tpm") }
func isSnapshotter(v json.RawMessage) bool { return isOneOf(v, "overlayfs", "stargz") }

func isOneOf(v json.RawMessage, words ...string) bool {
	s, ok := unquote(v)
	for _, w := range words {
		if ok && s == w {
			return true
		}
	}
	return false
}
