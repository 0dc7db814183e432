package grafana

import (
	"encoding/json"
	"io"
)

// object is a JSON object. encoding/json sorts its keys, so the output is stable.
type object = map[string]any

// columns is the width of Grafana's grid.
const columns = 24

// source refers to the data source that the viewer chooses.
var source = object{"type": "prometheus", "uid": "${datasource}"}

// row is a headline with the panels under it, laid out from left to right.
type row struct {
	title  string
	panels []panel
}

// panel is one graph. Width and height are in cells of the grid.
type panel struct {
	kind          string // timeseries, stat, heatmap, bargauge, table
	title         string
	about         string // what it shows and what to make of it
	unit          string // of Grafana
	width, height int
	queries       []query

	stack  bool
	max    any               // of the axis, nil = automatic
	min    any               // the same; 0 unless negative values make sense
	colors map[string]string // by the name of a series
	steps  []step            // thresholds, nil = none
	extra  func(p object)    // last words
}

// query is one PromQL expression. The legend is a template over labels.
type query struct {
	expr, legend string
}

// step colours values from a number on.
type step struct {
	from  any // nil = everything below the next step
	color string
}

// Write writes the dashboard as JSON.
func Write(w io.Writer) error {
	id := 0
	next := func() int { id++; return id }
	panels := []object{}
	y := 0
	for _, r := range rows() {
		panels = append(panels, object{
			"id": next(), "type": "row", "title": r.title, "collapsed": false, "panels": []object{},
			"gridPos": object{"x": 0, "y": y, "w": columns, "h": 1},
		})
		y++
		x, height := 0, 0
		for _, p := range r.panels {
			if x+p.width > columns {
				x, y, height = 0, y+height, 0
			}
			o := p.object()
			o["id"] = next()
			o["gridPos"] = object{"x": x, "y": y, "w": p.width, "h": p.height}
			panels = append(panels, o)
			x, height = x+p.width, max(height, p.height)
		}
		y += height
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(object{
		"uid":                  "dstack-gw",
		"title":                "dstack gateway",
		"description":          "Connections, apps, certificates and store of dstack-gw. Written by package deploy/grafana.",
		"tags":                 []string{"dstack"},
		"schemaVersion":        39, // Grafana 10.4
		"version":              1,
		"editable":             true,
		"graphTooltip":         1, // one crosshair over all panels
		"refresh":              "30s",
		"timezone":             "",
		"time":                 object{"from": "now-3h", "to": "now"},
		"timepicker":           object{},
		"fiscalYearStartMonth": 0,
		"liveNow":              false,
		"weekStart":            "",
		"links": []object{{
			"type": "link", "title": "Runbook", "icon": "doc", "tooltip": "What to do about each alert", "targetBlank": true,
			"url": "https://github.com/dstack-gw/dstack-gw/blob/main/docs/operations.md#alerts", "tags": []string{},
			"asDropdown": false, "includeVars": false, "keepTime": false,
		}},
		"templating":  object{"list": variables()},
		"annotations": object{"list": annotations()},
		"panels":      panels,
	})
}

func variables() []object {
	label := func(name, title, expr string) object {
		return object{
			"name": name, "label": title, "type": "query", "datasource": source, "hide": 0,
			"query": expr, "definition": expr,
			"multi": true, "includeAll": true, "current": object{"selected": true, "text": []string{"All"}, "value": []string{"$__all"}},
			"refresh": 2 /* when the time range changes */, "sort": 3 /* numerical */, "regex": "", "skipUrlSync": false, "options": []object{},
		}
	}
	return []object{
		{
			"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0,
			"multi": false, "includeAll": false, "current": object{"selected": false, "text": "default", "value": "default"}, "refresh": 1, "regex": "", "skipUrlSync": false, "options": []object{},
		},
		label("job", "Job", `label_values(dstack_gateway_build_info, job)`),
		label("node", "Node", `label_values(dstack_gateway_build_info{job=~"$job"}, node_id)`),
	}
}

func annotations() []object {
	return []object{
		{
			"name": "Annotations & Alerts", "type": "dashboard", "builtIn": 1, "enable": true, "hide": true, "iconColor": "rgba(0, 211, 255, 1)",
			"datasource": object{"type": "grafana", "uid": "-- Grafana --"},
		},
		{
			// Each value is the time of a start, so a restart is drawn where it happened.
			"name": "Starts", "enable": true, "hide": false, "iconColor": "orange", "datasource": source,
			"expr": sel(`dstack_gateway_start_time_seconds{}`) + ` * 1000`, "useValueForTime": true,
			"titleFormat": "Node {{node_id}} started", "tagKeys": "node_id", "step": "60s",
		},
	}
}

func (p panel) object() object {
	targets := []object{}
	for i, q := range p.queries {
		t := object{
			"refId": string(rune('A' + i)), "datasource": source, "expr": q.expr, "legendFormat": q.legend, "editorMode": "code",
			"range": true, "instant": false, "format": "time_series",
		}
		switch p.kind {
		case "heatmap":
			t["format"], t["legendFormat"] = "heatmap", "{{le}}"
		case "table":
			t["format"] = "table"
			fallthrough
		case "stat", "bargauge":
			t["range"], t["instant"] = false, true
		}
		targets = append(targets, t)
	}
	defaults := object{"unit": p.unit, "color": object{"mode": "palette-classic"}, "custom": object{}, "mappings": []object{}}
	steps := []object{{"color": "green", "value": nil}}
	if p.steps != nil {
		steps = steps[:0]
		for _, s := range p.steps {
			steps = append(steps, object{"color": s.color, "value": s.from})
		}
	}
	defaults["thresholds"] = object{"mode": "absolute", "steps": steps}
	if p.max != nil {
		defaults["max"] = p.max
	}
	if p.min != nil {
		defaults["min"] = p.min
	}
	overrides := []object{}
	for name, color := range p.colors {
		overrides = append(overrides, object{
			"matcher":    object{"id": "byName", "options": name},
			"properties": []object{{"id": "color", "value": object{"mode": "fixed", "fixedColor": color}}},
		})
	}
	sortByName(overrides)
	o := object{
		"type": p.kind, "title": p.title, "description": p.about, "datasource": source, "targets": targets,
		"fieldConfig": object{"defaults": defaults, "overrides": overrides},
	}
	switch p.kind {
	case "timeseries":
		mode := "none"
		if p.stack {
			mode = "normal"
		}
		defaults["custom"] = object{
			"drawStyle": "line", "lineInterpolation": "linear", "lineWidth": 1, "fillOpacity": map[bool]int{false: 8, true: 30}[p.stack],
			"gradientMode": "none", "showPoints": "never", "spanNulls": false, "axisPlacement": "auto", "axisLabel": "",
			"stacking": object{"mode": mode, "group": "A"}, "scaleDistribution": object{"type": "linear"},
			"thresholdsStyle": object{"mode": map[bool]string{false: "off", true: "dashed"}[p.steps != nil]},
		}
		if p.min == nil {
			defaults["min"] = 0
		}
		o["options"] = object{
			"legend":  object{"displayMode": "list", "placement": "bottom", "showLegend": true, "calcs": []string{}},
			"tooltip": object{"mode": "multi", "sort": "desc"},
		}
	case "stat":
		defaults["color"] = object{"mode": "thresholds"}
		o["options"] = object{
			"reduceOptions": object{"calcs": []string{"lastNotNull"}, "fields": "", "values": false},
			"colorMode":     "value", "graphMode": "none", "justifyMode": "auto", "orientation": "auto", "textMode": "auto",
			"wideLayout": true, "showPercentChange": false, "percentChangeColorMode": "standard",
		}
	case "bargauge":
		defaults["color"] = object{"mode": "continuous-BlPu"}
		defaults["min"] = 0
		o["options"] = object{
			"reduceOptions": object{"calcs": []string{"lastNotNull"}, "fields": "", "values": false},
			"displayMode":   "gradient", "orientation": "horizontal", "showUnfilled": true, "valueMode": "color", "minVizHeight": 10, "minVizWidth": 0, "maxVizHeight": 300,
			"namePlacement": "auto", "sizing": "auto",
			"legend": object{"displayMode": "list", "placement": "bottom", "showLegend": false, "calcs": []string{}},
		}
	case "heatmap":
		defaults["custom"] = object{"hideFrom": object{"legend": false, "tooltip": false, "viz": false}, "scaleDistribution": object{"type": "linear"}}
		delete(defaults, "color")
		o["options"] = object{
			"calculate": false, "cellGap": 1, "cellValues": object{"unit": "short"},
			"color":        object{"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange", "scale": "exponential", "reverse": false},
			"exemplars":    object{"color": "rgba(255,0,255,0.7)"},
			"filterValues": object{"le": 1e-9}, "legend": object{"show": false}, "rowsFrame": object{"layout": "auto"},
			"showValue": "never", "tooltip": object{"yHistogram": false, "mode": "single"},
			"yAxis": object{"axisPlacement": "left", "reverse": false, "unit": p.unit},
		}
	case "table":
		defaults["custom"] = object{"align": "auto", "inspect": false, "cellOptions": object{"type": "auto"}}
		o["options"] = object{"frameIndex": 0, "showHeader": true, "cellHeight": "sm", "footer": object{"show": false, "reducer": []string{"sum"}, "countRows": false}}
	}
	if p.extra != nil {
		p.extra(o)
	}
	return o
}
